"""The log of a run: every tick as JSON in an MCAP file, which Foxglove and PlotJuggler read too.

The loop hands each tick to a process that writes; it never waits for it. A log is readable up to
its last chunk, half a second or so, if the writer is killed, and whole if only the controller is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.tools.child_process import Child, frames

TICK, EVENT, POLICY = "/tick", "/event", "policy"
CHUNK = 1 << 16
HEADER, ROW, TOLD, ABOUT = b"H", b"T", b"E", b"P"
_FLAT = {"type": "object"}
_TICK = {
    "type": "object",
    "properties": {
        "reading": {
            "type": "object",
            "description": "what the robot said, null where it said no number",
        },
        "obs": {
            "type": "array",
            "items": {"type": "number"},
            "description": "what the policy was shown",
        },
        "action": {
            "type": "array",
            "items": {"type": "number"},
            "description": "what it chose, before any clip",
        },
        "asked": {"type": "object", "description": "the command the action stands for"},
        "sent": {"type": "object", "description": "what the robot's driver says it sent"},
        "limited": {
            "type": "array",
            "items": {"type": "number"},
            "description": "bits: position, velocity, ...",
        },
    },
}


class Row:
    """One tick as a row of numbers, with a name for each place; groups are views to write into."""

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        self.groups = {name: list(keys) for name, keys in groups.items()}
        self.data = np.full(sum(map(len, self.groups.values())), np.nan)
        self._views, start = {}, 0
        for name, keys in self.groups.items():
            self._views[name] = self.data[start : start + len(keys)]
            start += len(keys)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self._views[name]


class Log:
    """Writes an MCAP file through a process of its own; ``dropped`` counts ticks that it could not
    keep up with.
    """

    def __init__(self, path: Path, row: Row, about: Mapping[str, str]) -> None:
        if importlib.util.find_spec("mcap") is None:
            raise BridgeError("a log needs the package mcap: pip install mcap")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as e:
            raise BridgeError(f"cannot write {path}: {e.strerror or e}") from e
        self.path, self._row = path, row
        self._child = Child("log", str(file), keep=(file,))
        os.close(file)
        self._child.insist(HEADER, json.dumps(row.groups).encode())
        self._child.insist(ABOUT, json.dumps(dict(about)).encode())

    @property
    def dropped(self) -> int:
        """Ticks and events that are not in the log."""
        return self._child.dropped

    def tick(self) -> None:
        """Write the row as it is now."""
        self._child.send(ROW, time.time_ns().to_bytes(8, "little") + self._row.data.tobytes())

    def event(self, what: str, **facts: Any) -> None:
        """Write what happened."""
        text = json.dumps({"what": what, **facts}, default=_plain).encode()
        self._child.send(TOLD, time.time_ns().to_bytes(8, "little") + text)

    def close(self) -> None:
        """Finish the file."""
        self._child.close()


def _plain(x: Any) -> Any:
    return np.asarray(x).tolist()


def write(source: BinaryIO, target: BinaryIO) -> None:
    """Write frames into an MCAP file until they end."""
    from mcap.writer import Writer

    writer = Writer(target, chunk_size=CHUNK)
    writer.start(profile="", library="metarobot")
    channels = {
        topic: writer.register_channel(
            topic,
            "json",
            writer.register_schema(
                f"metarobot{topic.replace('/', '.')}", "jsonschema", _schema(schema)
            ),
        )
        for topic, schema in ((TICK, _TICK), (EVENT, _FLAT))
    }
    groups: dict[str, list[str]] = {}
    for number, (kind, payload) in enumerate(frames(source)):
        if kind == HEADER:
            groups = json.loads(payload)
            writer.add_metadata("groups", {"json": payload.decode()})
        elif kind == ABOUT:
            writer.add_metadata(POLICY, json.loads(payload))
        else:
            at, body = int.from_bytes(payload[:8], "little"), payload[8:]
            text = _named(groups, np.frombuffer(body)) if kind == ROW else body
            writer.add_message(channels[TICK if kind == ROW else EVENT], at, text, at, number)
    writer.finish()  # type: ignore[no-untyped-call]


def _schema(schema: Mapping[str, Any]) -> bytes:
    return json.dumps(schema).encode()


LISTS = ("obs", "action", "noise", "limited")
"""Groups that are written as lists; the others are objects, and ``tick``'s own stand at the top."""


def _named(groups: Mapping[str, Sequence[str]], row: NDArray[np.float64]) -> bytes:
    """Write a row as JSON; numbers keep all their digits, and what is not finite becomes null."""
    values = [v if math.isfinite(v) else None for v in row.tolist()]
    named: dict[str, Any] = {}
    start = 0
    for name, keys in groups.items():
        part = values[start : start + len(keys)]
        start += len(keys)
        if name == "tick":
            named.update(zip(keys, part, strict=True))
        else:
            named[name] = part if name in LISTS else dict(zip(keys, part, strict=True))
    return json.dumps(named, separators=(",", ":")).encode()


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a log: (``/tick``, ``/event`` or ``policy``, content), up to where it ends or was cut
    off.
    """
    from mcap.exceptions import McapError
    from mcap.records import Channel, Message, Metadata
    from mcap.stream_reader import StreamReader

    try:
        file = path.open("rb")
    except OSError as e:
        raise BridgeError(f"cannot read {path}: {e.strerror or e}") from e
    topics: dict[int, str] = {}
    with file:
        try:
            for record in StreamReader(file).records:
                if isinstance(record, Channel):
                    topics[record.id] = record.topic
                elif isinstance(record, Message):
                    yield topics[record.channel_id], json.loads(record.data)
                elif isinstance(record, Metadata) and record.name == POLICY:
                    yield POLICY, record.metadata
        except (McapError, struct.error, EOFError) as e:
            if not topics:
                raise BridgeError(f"{path} is no log: {e}") from e  # else it was cut off by a kill


if __name__ == "__main__":
    with open(int(sys.argv[1]), "wb", buffering=0) as out:
        write(sys.stdin.buffer, out)
