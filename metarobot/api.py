"""The functions behind ``import metarobot``."""
