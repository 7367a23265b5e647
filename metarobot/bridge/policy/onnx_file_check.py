"""A look into an ONNX file before it is given to onnxruntime: nothing in it may come from
elsewhere.

Reads just enough of the protobuf wire format (onnx.proto3, IR 3 to 13), so that a robot needs no
``onnx`` package.
"""

from __future__ import annotations

from collections.abc import Iterator

from metarobot.bridge.errors import BridgeError

# message -> field number -> the message it holds
_NESTED = {
    "model": {7: "graph", 8: "opset"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "opset": {},
    "tensor": {},
}
_DOMAIN = {("opset", 1), ("node", 7)}
_EXTERNAL = {("tensor", 13), ("tensor", 14)}
_FUNCTIONS = {("model", 25)}
_STANDARD = (b"", b"ai.onnx")


def check(data: bytes) -> None:
    """Raise unless a model uses standard operators alone and holds all its numbers itself."""
    try:
        _check(memoryview(data), "model")
    except (IndexError, ValueError) as e:
        raise BridgeError(f"the ONNX file is damaged: {e}") from e


def _check(message: memoryview, kind: str) -> None:
    for field, value in _fields(message):
        if (kind, field) in _DOMAIN and bytes(_data(value)) not in _STANDARD:
            raise BridgeError(
                f"the ONNX file uses operators of {bytes(_data(value))!r}; only standard ones are run"
            )
        if (kind, field) in _FUNCTIONS:
            raise BridgeError(
                "the ONNX file brings functions of its own; only standard operators are run"
            )
        if (kind, field) in _EXTERNAL and value != 0:
            raise BridgeError("the ONNX file keeps numbers in another file; a policy is one file")
        if field in _NESTED[kind]:
            _check(_data(value), _NESTED[kind][field])


def _data(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Walk over a message: each field's number, and its value."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(message):
            raise ValueError("it is cut off")
        yield field, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")
