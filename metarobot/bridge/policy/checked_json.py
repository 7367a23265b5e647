"""Read a file and its JSON without believing either: every value is checked before it is used.

Python's ``json`` accepts ``NaN``, ``1e999``, a key given twice and any amount of nesting, and
``open`` waits for ever on a FIFO. The functions here refuse all of these. Each ``check_*`` function
returns the value in its type, or raises ``BadValueError`` with one line that names the place, the
value, and what would be right.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_INTEGER_DIGITS = 18
"""Longer integers do not fit 64 bits, and Python's own grow without a limit."""
MAX_SHOWN_CHARS = 60
"""Longer values are shortened in messages."""
MAX_TEXT_CHARS = 4096
MAX_NAME_CHARS = 200
MAX_NAMES = 4096
PIECE_BYTES = 1 << 20
"""How much of a file is read at once."""


class BadValueError(ValueError):
    """A value that is not what it must be; the message is one line."""


def open_regular_file(path: Path, max_bytes: int) -> BinaryIO:
    """Open a regular file for reading; never wait.

    Raises:
        OSError: The operating system refuses.
        BadValueError: It is a folder, a FIFO or a device, or larger than ``max_bytes``.
    """
    # a FIFO without a writer would hold up an open that may block
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadValueError("it is not a regular file")
        if status.st_size > max_bytes:
            raise BadValueError(f"it is larger than {max_bytes:,} bytes")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; never wait, and never read more than ``max_bytes``.

    Raises:
        OSError: The operating system refuses.
        BadValueError: As of ``open_regular_file``.
    """
    with open_regular_file(path, max_bytes) as file:
        # it may have grown since, or not tell its size, as files in /proc; in pieces, as reading
        # ``max_bytes`` at once would reserve that much memory
        data = bytearray()
        while len(data) <= max_bytes and (piece := file.read(PIECE_BYTES)):
            data += piece
    if len(data) > max_bytes:
        raise BadValueError(f"it is larger than {max_bytes:,} bytes")
    return bytes(data)


def parse_json(data: bytes) -> Any:
    """Parse JSON; numbers are finite, and no object has a key twice.

    Raises:
        ValueError: It is not such JSON, or nested too deeply.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite_float,
            parse_int=_short_integer,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise BadValueError("it is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadValueError(f"the key {show(twice)} is there twice")
    return unique


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadValueError(f"the number {show(text)} is too large")
    return number


def _short_integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise BadValueError(f"the number {show(text)} is too large")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise BadValueError(f"{text} is not a number of JSON")


def canonical_digest(data: Any) -> str:
    """Return the SHA-256 of JSON data, whatever its key order and white space."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def show(value: Any) -> str:
    """Return a value as a short text of one line."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"


def check_number(value: Any, place: str, low: float, high: float) -> float:
    """Return a finite number in [low, high]."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise BadValueError(f"{place} is {show(value)}, not a number from {low:g} to {high:g}")
    return float(value)


def check_integer(value: Any, place: str, low: int, high: int) -> int:
    """Return an integer in [low, high]."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not low <= value <= high:
        raise BadValueError(f"{place} is {show(value)}, not an integer from {low} to {high}")
    return int(value)


def check_boolean(value: Any, place: str) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise BadValueError(f"{place} is {show(value)}, not true or false")
    return value


def check_text(value: Any, place: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Return a text of one line, possibly empty."""
    if not isinstance(value, str):
        raise BadValueError(f"{place} is {show(value)}, not a text")
    if not value.isprintable() or len(value) > max_chars:
        raise BadValueError(
            f"{place} is {show(value)}, not one line of at most {max_chars} characters"
        )
    return value


def check_name(value: Any, place: str) -> str:
    """Return a text that is not empty."""
    name = check_text(value, place, MAX_NAME_CHARS)
    if not name:
        raise BadValueError(f"{place} is an empty name")
    return name


def check_choice(value: Any, place: str, choices: Collection[str]) -> str:
    """Return one of the texts ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise BadValueError(f"{place} is {show(value)}; it may be: {', '.join(choices)}")
    return value


def check_list(value: Any, place: str, *, length: int | None = None) -> list[Any]:
    """Return a list, of a given length if there is one."""
    if not isinstance(value, list):
        raise BadValueError(f"{place} is {show(value)}, not a list")
    if length is not None and len(value) != length:
        raise BadValueError(f"{place} has {len(value)} entries, not {length}")
    return value


def check_numbers(
    value: Any, place: str, low: float, high: float, *, length: int
) -> tuple[float, ...]:
    """Return a list of finite numbers in [low, high]."""
    entries = check_list(value, place, length=length)
    return tuple(check_number(x, f"{place}[{i}]", low, high) for i, x in enumerate(entries))


def check_names(value: Any, place: str) -> tuple[str, ...]:
    """Return a list of names, each of them once."""
    entries = check_list(value, place)
    if len(entries) > MAX_NAMES:
        raise BadValueError(f"{place} has {len(entries)} entries, more than {MAX_NAMES}")
    names = tuple(check_name(x, f"{place}[{i}]") for i, x in enumerate(entries))
    seen = set()
    for name in names:
        if name in seen:
            raise BadValueError(f"{place} has {show(name)} twice")
        seen.add(name)
    return names


def check_object(
    value: Any, place: str, keys: Collection[str], optional: Collection[str] = ()
) -> dict[str, Any]:
    """Return an object that has all of ``keys``, and beyond them only ``optional`` ones."""
    if not isinstance(value, dict):
        raise BadValueError(f"{place} is {show(value)}, not an object")
    for key in keys:
        if key not in value:
            raise BadValueError(f"{place} lacks {key!r}")
    for key in value:
        if key not in keys and key not in optional:
            raise BadValueError(f"{place} has the key {show(key)}, which means nothing here")
    return value
