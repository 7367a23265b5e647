"""Check an ONNX file before onnxruntime loads it: what is not known to be harmless is refused.

onnxruntime can read other files, loop for ever and ask for any amount of memory if a model says so.
A policy needs none of that. So that a robot needs no ``onnx`` package, this reads the protobuf wire
format itself. A model passes only if

- each field of each message is in ``FIELDS``, which is what ``metarobot export`` writes: no other
  files, no subgraphs, no functions, no sparse or quantised tensors;
- each operator is in ``OPERATORS``, of ONNX's own domain: none loops, and none has an output whose
  shape depends on anything but shapes and constants;
- the shape of each tensor stands in the file, and all of them together hold at most
  ``MAX_NUMBERS`` numbers. onnxruntime computes the shapes itself, and is asked to refuse a model
  whose declared ones differ (``trial_step.STRICT_SHAPES``). So the memory of a step is bounded.

Wire format: https://protobuf.dev/programming-guides/encoding. Messages: onnx.proto3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.checked_json import show

MAX_MODEL_BYTES = 64 << 20
MAX_NODES = 2_000
MAX_NUMBERS = 16_000_000
"""Most numbers of all tensors together, constants and what is computed; 64 MB of float32."""
MAX_DIMENSIONS = 6

# protobuf's wire types
_VARINT = 0
_FIXED_64 = 1
_BYTES = 2
_FIXED_32 = 5
_FIXED_SIZES = {_FIXED_64: 8, _FIXED_32: 4}
_MAX_TAG = 2**32 - 1
"""Readers differ in what they make of larger tags, so that a field could hide behind one."""
_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """A field that a message may have."""

    name: str
    wire_type: int
    message: str = ""
    """Kind of the message that it holds, a key of ``FIELDS``; empty for anything else."""
    repeated: bool = False


def _text(name: str, *, repeated: bool = False) -> Field:
    return Field(name, _BYTES, repeated=repeated)


def _integer(name: str, *, repeated: bool = False) -> Field:
    return Field(name, _VARINT, repeated=repeated)


def _message(name: str, kind: str, *, repeated: bool = False) -> Field:
    return Field(name, _BYTES, kind, repeated)


FIELDS: dict[str, dict[int, Field]] = {
    "model": {
        1: _integer("ir_version"),
        2: _text("producer_name"),
        3: _text("producer_version"),
        7: _message("graph", "graph"),
        8: _message("opset_import", "opset", repeated=True),
        14: _message("metadata_props", "property", repeated=True),
    },
    "opset": {1: _text("domain"), 2: _integer("version")},
    "property": {1: _text("key"), 2: _text("value")},
    "graph": {
        1: _message("node", "node", repeated=True),
        2: _text("name"),
        5: _message("initializer", "tensor", repeated=True),
        11: _message("input", "value", repeated=True),
        12: _message("output", "value", repeated=True),
        13: _message("value_info", "value", repeated=True),
    },
    "node": {
        1: _text("input", repeated=True),
        2: _text("output", repeated=True),
        3: _text("name"),
        4: _text("op_type"),
        5: _message("attribute", "attribute", repeated=True),
        7: _text("domain"),
    },
    "attribute": {
        1: _text("name"),
        2: Field("f", _FIXED_32),
        3: _integer("i"),
        4: _text("s"),
        8: _integer("ints", repeated=True),
        20: _integer("type"),
    },
    "tensor": {
        1: _integer("dims", repeated=True),
        2: _integer("data_type"),
        8: _text("name"),
        9: _text("raw_data"),
    },
    "value": {1: _text("name"), 2: _message("type", "type")},
    "type": {1: _message("tensor_type", "tensor_type")},
    "tensor_type": {1: _integer("elem_type"), 2: _message("shape", "shape")},
    "shape": {1: _message("dim", "dimension", repeated=True)},
    "dimension": {1: _integer("dim_value")},
}
"""Kind of a message -> number of a field -> the field. Names are those of onnx.proto3."""

_REFUSED_FIELDS = {
    ("model", 25): "functions of its own",
    ("graph", 15): "sparse numbers",
    ("node", 8): "functions of its own",
    ("attribute", 5): "numbers in an attribute",
    ("attribute", 6): "a subgraph",
    ("attribute", 10): "numbers in an attribute",
    ("attribute", 11): "subgraphs",
    ("attribute", 22): "sparse numbers",
    ("attribute", 23): "sparse numbers",
    ("tensor", 13): "numbers in another file",
    ("tensor", 14): "numbers in another file",
}
"""What the best-known fields are that are not in ``FIELDS``, for messages."""

EXPORTED_OPERATORS = frozenset(
    {
        "Add", "Cast", "Clip", "Concat", "Div", "Exp", "GRU", "Gather", "Gemm", "Greater",
        "Identity", "LSTM", "Less", "Mul", "Relu", "Reshape", "Sigmoid", "Slice", "Softplus",
        "Split", "Sqrt", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators of the exports of all agents of this package."""
OTHER_OPERATORS = frozenset(
    {
        "Abs", "And", "Cos", "Elu", "Equal", "Erf", "Gelu", "GreaterOrEqual", "LayerNormalization",
        "LeakyRelu", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Min", "Neg", "Not", "Or",
        "Pow", "Reciprocal", "Selu", "Sign", "Sin", "Softmax", "Squeeze",
    }
)  # fmt: skip
"""Operators that other agents may use: functions of single numbers, and matrix products."""
OPERATORS = EXPORTED_OPERATORS | OTHER_OPERATORS
_SHAPE_OPERATORS = frozenset({"Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"})
"""Their outputs' shapes depend on the values of all inputs but the first: these are constants."""

_ITEM_BYTES = {1: 4, 6: 4, 7: 8, 9: 1, 11: 8}
"""TensorProto.DataType -> bytes a number: float32, int32, int64, bool, float64."""

Message = dict[str, list["int | memoryview | Message"]]
"""Name of a field -> its values."""


def check_onnx_file(data: bytes) -> dict[str, str]:
    """Check that onnxruntime may load a model; return the metadata in it, key -> value.

    Raises:
        BridgeError: It may not, or the file is damaged.
    """
    try:
        if len(data) > MAX_MODEL_BYTES:
            raise ValueError(f"it is larger than {MAX_MODEL_BYTES:,} bytes")
        model = _parse(memoryview(data), "model")
        _check_operator_set(model)
        _check_graph(_only_message(model, "graph"))
        return _properties(model)
    except ValueError as e:
        raise BridgeError(f"the ONNX file is damaged: {e}") from e


def _check_operator_set(model: Message) -> None:
    for opset in _messages(model, "opset_import"):
        _check_domain(opset)
    if len(model.get("opset_import", ())) != 1:
        raise ValueError("it names no set of operators, or several")


def _check_domain(message: Message) -> None:
    if domain := _text_of(message, "domain"):
        raise BridgeError(
            f"the ONNX file uses operators of {show(domain)}; only standard ones are run"
        )


def _properties(model: Message) -> dict[str, str]:
    properties: dict[str, str] = {}
    for entry in _messages(model, "metadata_props"):
        key = _text_of(entry, "key")
        if key in properties:
            raise ValueError(f"its metadata has {show(key)} twice")
        properties[key] = _text_of(entry, "value")
    return properties


def _check_graph(graph: Message) -> None:
    """Check operators, constants, and the number of numbers in all tensors."""
    constants: set[str] = set()
    numbers = 0
    for tensor in _messages(graph, "initializer"):
        name = _text_of(tensor, "name")
        if not name or name in constants:
            raise ValueError(f"a constant is called {show(name)}, as another is")
        constants.add(name)
        numbers += _check_constant(tensor, name)

    declared: set[str] = set()
    for kind in ("input", "output", "value_info"):
        for value in _messages(graph, kind):
            name = _text_of(value, "name")
            if not name or name in declared:
                raise ValueError(f"the tensor {show(name)} is declared twice")
            declared.add(name)
            numbers += _count_declared(value, name)
    if numbers > MAX_NUMBERS:
        raise BridgeError(
            f"the ONNX file's tensors hold {numbers:,} numbers, more than {MAX_NUMBERS:,}"
        )
    inputs = {_text_of(value, "name") for value in _messages(graph, "input")}
    if both := inputs & constants:
        raise ValueError(f"{show(min(both))} is an input and a constant")

    nodes = list(_messages(graph, "node"))
    if len(nodes) > MAX_NODES:
        raise BridgeError(f"the ONNX file has {len(nodes)} operators, more than {MAX_NODES}")
    for node in nodes:
        _check_node(node, constants, declared)


def _check_node(node: Message, constants: set[str], declared: set[str]) -> None:
    _check_domain(node)
    operator = _text_of(node, "op_type")
    if operator not in OPERATORS:
        raise BridgeError(
            f"the ONNX file uses the operator {show(operator)}, which no policy needs; "
            f"used may be: {', '.join(sorted(OPERATORS))}"
        )
    for name in _texts(node, "output"):
        if name and name not in declared:
            raise BridgeError(
                f"the ONNX file does not declare the shape of {show(name)}: export the policy again"
            )
    if operator in _SHAPE_OPERATORS:
        for name in _texts(node, "input")[1:]:
            if name and name not in constants:
                raise BridgeError(
                    f"the ONNX file has a {operator} that depends on {show(name)}, "
                    "which is no constant"
                )


def _check_constant(tensor: Message, name: str) -> int:
    """Return the number of numbers of a constant, which must all be there."""
    data_type = _integer_of(tensor, "data_type")
    if data_type not in _ITEM_BYTES:
        raise BridgeError(f"the ONNX file's {show(name)} has numbers of type {data_type}")
    count = _product(_integers(tensor, "dims"), name)
    data = tensor.get("raw_data", [memoryview(b"")])[0]
    assert isinstance(data, memoryview)
    if len(data) != count * _ITEM_BYTES[data_type]:
        raise ValueError(f"{show(name)} has {len(data)} bytes for {count} numbers")
    return count


def _count_declared(value: Message, name: str) -> int:
    """Return the number of numbers of an input, output or intermediate tensor."""
    tensor_type = _only_message(_only_message(value, "type"), "tensor_type")
    data_type = _integer_of(tensor_type, "elem_type")
    if data_type not in _ITEM_BYTES:
        raise BridgeError(f"the ONNX file's {show(name)} has numbers of type {data_type}")
    sizes = []
    for dimension in _messages(_only_message(tensor_type, "shape"), "dim"):
        if "dim_value" not in dimension:
            raise BridgeError(f"the ONNX file's {show(name)} has no fixed shape")
        sizes.append(_integer_of(dimension, "dim_value"))
    return _product(sizes, name)


def _product(sizes: list[int], name: str) -> int:
    if len(sizes) > MAX_DIMENSIONS:
        raise BridgeError(f"the ONNX file's {show(name)} has {len(sizes)} dimensions")
    # one by one, as a product of negative numbers may be small
    for size in sizes:
        if size > MAX_NUMBERS:
            raise BridgeError(f"the ONNX file's {show(name)} has a dimension of {size}")
    count = math.prod(sizes)
    if count > MAX_NUMBERS:
        raise BridgeError(
            f"the ONNX file's {show(name)} holds {count:,} numbers, more than {MAX_NUMBERS:,}"
        )
    return count


def _messages(message: Message, name: str) -> Iterator[Message]:
    for value in message.get(name, ()):
        assert isinstance(value, dict)
        yield value


def _only_message(message: Message, name: str) -> Message:
    for value in _messages(message, name):
        return value
    raise ValueError(f"it lacks {name}")


def _integers(message: Message, name: str) -> list[int]:
    values = []
    for value in message.get(name, ()):
        assert isinstance(value, int)
        values.append(value)
    return values


def _integer_of(message: Message, name: str) -> int:
    values = _integers(message, name)
    return values[0] if values else 0


def _texts(message: Message, name: str) -> list[str]:
    texts = []
    for value in message.get(name, ()):
        assert isinstance(value, memoryview)
        texts.append(bytes(value).decode("utf-8"))
    return texts


def _text_of(message: Message, name: str) -> str:
    texts = _texts(message, name)
    return texts[0] if texts else ""


def _parse(data: memoryview, kind: str) -> Message:
    """Parse a message of a kind in ``FIELDS``, with all messages within.

    Raises:
        BridgeError: It has a field that is not in ``FIELDS``.
        ValueError: The bytes are no protobuf message.
    """
    message: Message = {}
    position = 0
    while position < len(data):
        # a tag is the field's number and, in its lowest three bits, the wire type
        tag, position = _read_varint(data, position)
        if tag > _MAX_TAG:
            raise ValueError(f"a tag of more than 32 bits, {tag}")
        wire_type = tag & 7
        field = FIELDS[kind].get(tag >> 3)
        if field is None:
            what = _REFUSED_FIELDS.get(
                (kind, tag >> 3), f"the unknown field {tag >> 3} in a {kind}"
            )
            raise BridgeError(f"the ONNX file has {what}; a policy is one file and needs none")
        if wire_type != field.wire_type:
            raise ValueError(f"{kind}.{field.name} is of wire type {wire_type}")

        value: int | memoryview | Message
        if wire_type == _VARINT:
            value, position = _read_varint(data, position)
        else:
            if wire_type == _BYTES:
                size, position = _read_varint(data, position)
            else:
                size = _FIXED_SIZES[wire_type]
            if size > len(data) - position:
                raise ValueError("it is cut off")
            content = data[position : position + size]
            value = _parse(content, field.message) if field.message else content
            if wire_type == _BYTES and not field.message and field.name != "raw_data":
                _check_text(content, f"{kind}.{field.name}")
            position += size

        values = message.setdefault(field.name, [])
        # readers merge a message that stands twice: what each holds alone would say little
        if values and not field.repeated:
            raise ValueError(f"{kind}.{field.name} is there twice")
        values.append(value)
    return message


def _check_text(content: memoryview, place: str) -> None:
    """Raise ``ValueError`` unless a text may stand in a message; its encoding is UTF-8."""
    text = bytes(content).decode("utf-8")
    if not text.isprintable():
        raise ValueError(f"{place} is {show(text)}, not a line of text")


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return a varint, seven bits a byte with the lowest first, and the position after it."""
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        if position + i >= len(data):
            raise ValueError("it is cut off")
        byte = data[position + i]
        value |= (byte & 0x7F) << (7 * i)
        # the highest bit says that another byte follows
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, position + i + 1
    raise ValueError("a number of more than 64 bits")
