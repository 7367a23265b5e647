"""Change files and JSON data at random, as bad luck and strangers do."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
DEEP = "a value nested 100,000 deep"
"""Stands in JSON data for what ``dump`` writes as such a value; Python cannot hold it."""
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "\n",
    "x" * 10_000,
    [],
    {},
    [[]],
    {"a": 1},
    0,
    -1,
    1.5,
    10**17,
    10**40,
    -(10**400),
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    DEEP,
)


def mutate_bytes(data: bytes, rng: Rng) -> tuple[str, bytes]:
    """Return a kind of change, and the changed bytes."""
    kinds: dict[str, Callable[[bytes, Rng], bytes]] = {
        "bit flipped": _flip_bit,
        "byte changed": _change_byte,
        "cut off": _cut_off,
        "piece removed": _remove_piece,
        "piece doubled": _double_piece,
        "rubbish appended": _append,
    }
    kind = str(rng.choice(list(kinds)))
    return kind, kinds[kind](data, rng)


def _flip_bit(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _change_byte(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    changed[rng.integers(len(data))] = int(rng.integers(256))
    return bytes(changed)


def _cut_off(data: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(len(data))]


def _remove_piece(data: bytes, rng: Rng) -> bytes:
    start, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    return data[:start] + data[start + size :]


def _double_piece(data: bytes, rng: Rng) -> bytes:
    start, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    return data[: start + size] + data[start:]


def _append(data: bytes, rng: Rng) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 64)))


def change_digit(text: bytes, rng: Rng) -> bytes:
    """Return text with one of its digits replaced by another."""
    places = [i for i, byte in enumerate(text) if byte in b"0123456789"]
    place = int(rng.choice(places))
    other = (text[place] - ord("0") + int(rng.integers(1, 10))) % 10
    return text[:place] + str(other).encode() + text[place + 1 :]


def mutate_json(data: Any, rng: Rng) -> tuple[str, Any]:
    """Return a kind of change, and a copy of the data with one value changed."""
    copy = json.loads(json.dumps(data))
    kinds = {
        "deleted": object,
        "odd value": object,
        "number changed": int | float,
        "list changed": list,
        "key added": dict,
    }
    kind = str(rng.choice(list(kinds)))
    fitting = [
        (holder, key) for holder, key in _places(copy) if isinstance(holder[key], kinds[kind])
    ]
    if not fitting:  # a list is changed where there is none
        kind = "odd value"
        fitting = _places(copy)
    holder, key = fitting[int(rng.integers(len(fitting)))]
    value = holder[key]

    if kind == "deleted":
        del holder[key]
    elif kind == "odd value":
        holder[key] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    elif kind == "number changed":
        factor = float(rng.choice([-1.0, 0.0, 0.5, 1.01, 10.0, -1000.0, 1e6, 1e9, 1e30]))
        holder[key] = value * factor if rng.random() < 0.5 else factor
    elif kind == "list changed":
        changes = [value[:-1], value + value[-1:], value[::-1], [value], value * 1000]
        holder[key] = changes[int(rng.integers(len(changes)))]
    else:
        value["surprise"] = 1
    return kind, copy


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return holder and key of each value within; of a list only its first and last element."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list) and value:
        keys = sorted({0, len(value) - 1})
    else:
        keys = []
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found


def dump(data: Any) -> str:
    """Return data as JSON text, with ``DEEP`` as what it stands for."""
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(data).replace(json.dumps(DEEP), deep)
