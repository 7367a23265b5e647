"""Check an ONNX file before onnxruntime loads it: it must hold all that it needs.

It may use standard operators alone, and no other file. So that a robot needs no ``onnx`` package,
this reads just enough of the protobuf wire format and of onnx.proto3, IR versions 3 to 13. Source:
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

from metarobot.bridge.errors import BridgeError

# onnx.proto3: message -> field number -> the message that the field holds
_NESTED_MESSAGES = {
    "model": {7: "graph", 8: "opset"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "opset": {},
    "tensor": {},
}
# fields that name an operator domain: OperatorSetIdProto.domain, NodeProto.domain
_DOMAIN_FIELDS = {("opset", 1), ("node", 7)}
# fields of tensors in other files: TensorProto.external_data, TensorProto.data_location
_EXTERNAL_DATA_FIELDS = {("tensor", 13), ("tensor", 14)}
# ModelProto.functions
_FUNCTION_FIELDS = {("model", 25)}
_STANDARD_DOMAINS = (b"", b"ai.onnx")

# protobuf's wire types
_VARINT = 0
_FIXED_64 = 1
_LENGTH_DELIMITED = 2
_FIXED_32 = 5
_FIXED_SIZES = {_FIXED_64: 8, _FIXED_32: 4}
_MAX_VARINT_SHIFT = 63
"""A varint has at most 64 bits."""

Field = tuple[int, int | memoryview]
"""Number and value of a field: an integer, or the bytes of anything else."""


def check_onnx_file(data: bytes) -> None:
    """Check that a model uses standard operators alone and holds all its numbers itself.

    Raises:
        BridgeError: It does not, or is damaged.
    """
    try:
        _check_message(memoryview(data), "model")
    except (IndexError, ValueError) as e:
        raise BridgeError(f"the ONNX file is damaged: {e}") from e


def _check_message(message: memoryview, kind: str) -> None:
    """Check a message of a kind in ``_NESTED_MESSAGES``, and all messages within."""
    for number, value in _fields(message):
        field = (kind, number)
        if field in _DOMAIN_FIELDS and bytes(_as_bytes(value)) not in _STANDARD_DOMAINS:
            raise BridgeError(
                f"the ONNX file uses operators of {bytes(_as_bytes(value))!r}; "
                "only standard ones are run"
            )
        if field in _FUNCTION_FIELDS:
            raise BridgeError(
                "the ONNX file brings functions of its own; only standard operators are run"
            )
        if field in _EXTERNAL_DATA_FIELDS and value != 0:
            raise BridgeError("the ONNX file keeps numbers in another file; a policy is one file")
        if number in _NESTED_MESSAGES[kind]:
            _check_message(_as_bytes(value), _NESTED_MESSAGES[kind][number])


def _as_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in their order.

    Raises:
        ValueError, IndexError: The bytes are no protobuf message.
    """
    position = 0
    while position < len(message):
        # a key is the field's number and, in its lowest three bits, the wire type
        key, position = _read_varint(message, position)
        number = key >> 3
        wire_type = key & 7

        if wire_type == _VARINT:
            value, position = _read_varint(message, position)
            yield number, value
            continue
        if wire_type == _LENGTH_DELIMITED:
            size, position = _read_varint(message, position)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type}")

        if position + size > len(message):
            raise ValueError("it is cut off")
        yield number, message[position : position + size]
        position += size


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a varint, seven bits a byte with the lowest first, and the position after it."""
    value = 0
    shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        # the highest bit says that another byte follows
        if byte < 0x80:
            return value, position
        if shift > _MAX_VARINT_SHIFT:
            raise ValueError("a number without end")
