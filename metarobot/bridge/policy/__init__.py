"""The exported policy: its metadata, its check, and running it."""

from metarobot._moved import moved_names

__getattr__ = moved_names(__name__, "metarobot.bridge.policy.onnx_policy", Policy="OnnxPolicy")
