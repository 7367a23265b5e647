"""The command line: one file a group of subcommands, which call the functions of ``metarobot``."""
