"""Read the log of a run, which may be damaged, or come from a stranger.

Nothing in the file is believed: sizes are capped before memory is taken, checksums are compared,
and every number is checked before it is used. A log that was cut off, because its writer was
killed, is read up to there; one that was changed is refused.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.tools.log_format import GROUPS_RECORD, POLICY_RECORD, TOPICS, later_parts

GAP = "gap"
"""Topic of what ``read_log`` yields where parts of the log were deleted to save space."""

MAX_PART_BYTES = 1 << 30
"""Size of one file; the log of an hour that is not split into parts has 0.2 GB."""
MAX_RECORD_BYTES = 16 << 20
"""Size of a record, and of a chunk of records before it was compressed; the writer's have 64 kB."""
MAX_EXPANSION = 200
"""Largest ratio of the size of all chunks to their compressed size; ticks of a robot that stands
still have about 30."""
EXPANSION_ALLOWANCE_BYTES = 64 << 20
"""Size up to which ``MAX_EXPANSION`` is not looked at."""

_MAGIC = b"\x89MCAP0\r\n"
_FRAME = struct.Struct("<BQ")
"""Kind of a record, and its length."""
_CHANNEL = 0x04
_MESSAGE = 0x05
_CHUNK = 0x06
_METADATA = 0x0C
_DATA_END = 0x0F


class _CutOffError(Exception):
    """The file ends in the middle of a record."""


class _DamagedError(Exception):
    """Content that the writer would not have written."""


@dataclass
class _Sizes:
    """Bytes of all chunks so far."""

    packed: int = 0
    unpacked: int = 0


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (topic, content) of a log and of all its parts, up to where the log is cut off.

    Topics are ``/tick``, ``/event``, ``policy``, and ``gap`` where parts are missing.

    Raises:
        BridgeError: A file cannot be read, is no log, or is damaged.
    """
    yield from read_part(path)
    last = 1
    for number, part in later_parts(path):
        if number != last + 1:
            yield GAP, {}
        last = number
        yield from read_part(part)


def read_part(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (topic, content) of one file, up to where it is cut off.

    Raises:
        BridgeError: The file cannot be read, is no log, or is damaged.
    """
    file = _open_part(path)
    topics: dict[int, str] = {}
    with file:
        try:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise BridgeError(f"{path} is no log: it does not begin as an MCAP file does")
            yield from _read_records(file, topics)
        except _CutOffError:
            # A log that is whole ends with the same bytes as it begins with: then no kill has cut
            # it off, but a length in it is wrong
            if _ends_with_magic(file):
                raise BridgeError(f"{path} is damaged: a record is longer than the file") from None
            if not topics:
                raise BridgeError(f"{path} is no log: it holds no tick") from None
        except OSError as e:
            raise BridgeError(f"cannot read {path}: {e.strerror or e}") from e
        except _DamagedError as e:
            raise BridgeError(f"{path} is damaged: {e}") from e


def _open_part(path: Path) -> BinaryIO:
    """Open a regular file; never wait, as for the writer of a FIFO.

    Raises:
        BridgeError: It cannot be read, is no regular file, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise BridgeError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise BridgeError(f"cannot read {path!s:.100}: {e}") from e
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_PART_BYTES:
        os.close(descriptor)
        raise BridgeError(
            f"cannot read {path}: it is no regular file of at most {MAX_PART_BYTES:,} bytes"
        )
    return os.fdopen(descriptor, "rb")


def _read_records(file: BinaryIO, topics: dict[int, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is in the data section of a file."""
    crc = zlib.crc32(_MAGIC)
    sizes = _Sizes()
    while True:
        frame = file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            raise _CutOffError
        kind, length = _FRAME.unpack(frame)
        if length > MAX_RECORD_BYTES:
            _refuse_length(file, length)
        data = file.read(length)
        if len(data) < length:
            raise _CutOffError

        if kind == _DATA_END:
            # What follows are indexes, which nothing here uses
            (expected,) = _unpack("<I", data)
            if expected and expected != crc:
                raise _DamagedError("a checksum is wrong")
            return
        crc = zlib.crc32(data, zlib.crc32(frame, crc))
        if kind == _CHUNK:
            for inner_kind, inner in _records_of_chunk(data, sizes):
                yield from _read_record(inner_kind, inner, topics)
        else:
            yield from _read_record(kind, data, topics)


def _refuse_length(file: BinaryIO, length: int) -> NoReturn:
    left = file.seek(0, io.SEEK_END)
    if length > left and not _ends_with_magic(file):
        raise _CutOffError
    raise _DamagedError(f"a record of {length:,} bytes, more than {MAX_RECORD_BYTES:,}")


def _records_of_chunk(data: bytes, sizes: _Sizes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of the records in a chunk, whose size and checksum are checked."""
    fixed = struct.Struct("<QQQII")
    if len(data) < fixed.size:
        raise _DamagedError("a chunk that is too short")
    _start, _end, size, crc, name_length = fixed.unpack_from(data)
    name_end = fixed.size + name_length
    (packed_length,) = _unpack("<Q", data[name_end : name_end + 8])
    compression = data[fixed.size : name_end]
    packed = data[name_end + 8 :]
    if len(packed) != packed_length:
        raise _DamagedError("a chunk that is too short")
    if size > MAX_RECORD_BYTES:
        raise _DamagedError(f"a chunk of {size:,} bytes, more than {MAX_RECORD_BYTES:,}")
    sizes.packed += len(packed)
    sizes.unpacked += size
    if sizes.unpacked > EXPANSION_ALLOWANCE_BYTES + MAX_EXPANSION * sizes.packed:
        raise _DamagedError(f"it expands to more than {MAX_EXPANSION} times its size")

    content = _unpack_chunk(compression, packed, size)
    if len(content) != size or (crc and zlib.crc32(content) != crc):
        raise _DamagedError("a checksum is wrong")

    place = 0
    while place < len(content):
        if place + _FRAME.size > len(content):
            raise _DamagedError("a record that is too short")
        kind, length = _FRAME.unpack_from(content, place)
        place += _FRAME.size
        if length > len(content) - place:
            raise _DamagedError("a record that is too short")
        yield kind, content[place : place + length]
        place += length


def _unpack_chunk(compression: bytes, packed: bytes, size: int) -> bytes:
    """Return the content of a chunk; never more than ``size`` bytes are taken for it."""
    if compression == b"":
        return packed
    if compression != b"zstd":
        raise _DamagedError(f"chunks compressed by {compression[:20]!a}; they may be by zstd")
    try:
        import zstandard
    except ImportError as e:
        raise BridgeError("reading a log needs the package mcap: pip install mcap") from e
    try:
        # Python's binding allocates what the frame itself says, whatever its caller allows
        if zstandard.frame_content_size(packed) != size:
            raise _DamagedError("a chunk is not as large as it says")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    except zstandard.ZstdError as e:
        raise _DamagedError(f"a chunk cannot be unpacked: {e}") from e


def _read_record(
    kind: int, data: bytes, topics: dict[int, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a record of the data section says, if it says anything."""
    if kind == _CHANNEL:
        (number, _schema) = _unpack("<HH", data[:4])
        topics[number], _ = _text(data, 4)
    elif kind == _MESSAGE:
        head = struct.Struct("<HIQQ")
        if len(data) < head.size:
            raise _DamagedError("a message that is too short")
        number = head.unpack_from(data)[0]
        if number not in topics:
            raise _DamagedError("a message of a topic that it does not name")
        if topics[number] in TOPICS:
            yield topics[number], _json_object(data[head.size :])
    elif kind == _METADATA:
        name, place = _text(data, 0)
        if name in (POLICY_RECORD, GROUPS_RECORD):
            entries = _text_map(data, place)
            if name == POLICY_RECORD:
                yield POLICY_RECORD, entries


def _text_map(data: bytes, place: int) -> dict[str, Any]:
    (length,) = _unpack("<I", data[place : place + 4])
    place += 4
    if length != len(data) - place:
        raise _DamagedError("a record that is too short")
    entries = {}
    while place < len(data):
        key, place = _text(data, place)
        entries[key], place = _text(data, place)
    return entries


def _text(data: bytes, place: int) -> tuple[str, int]:
    """Return the text that begins at a place with its length, and where it ends."""
    (length,) = _unpack("<I", data[place : place + 4])
    end = place + 4 + length
    if end > len(data):
        raise _DamagedError("a text that is longer than its record")
    try:
        return data[place + 4 : end].decode(), end
    except UnicodeDecodeError:
        raise _DamagedError("a text that is no UTF-8") from None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise _DamagedError("JSON that is nested too deeply") from None
    except ValueError as e:
        raise _DamagedError(f"it holds what is no JSON: {' '.join(str(e).split())[:100]}") from None
    if not isinstance(content, dict):
        raise _DamagedError("JSON that is no object")
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _unpack(form: str, data: bytes) -> tuple[Any, ...]:
    try:
        return struct.unpack(form, data)
    except struct.error:
        raise _DamagedError("a record that is too short") from None


def _ends_with_magic(file: BinaryIO) -> bool:
    end = file.seek(0, io.SEEK_END)
    file.seek(max(end - len(_MAGIC), 0))
    return file.read() == _MAGIC
