"""The robot side: an exported policy on a real robot's controller, with numpy and onnxruntime
alone.
"""
