"""The log of a run: every tick as JSON in an MCAP file, which Foxglove and PlotJuggler open too.

The control loop hands each tick to a process that writes it, and never waits for it. If that
process is killed the log is readable up to its last chunk, half a second or so; if only the
controller is killed the log is complete.
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
from metarobot.bridge.tools.child_process import ChildProcess, read_frames

TICK_TOPIC = "/tick"
EVENT_TOPIC = "/event"
POLICY_RECORD = "policy"
"""Name of the metadata record that says which policy made the log."""

CHUNK_BYTES = 1 << 16
"""MCAP chunk: half a second of ticks or so, which is what a kill of the writer can lose."""

# Kinds of frames from the control loop to the writer
COLUMNS_FRAME = b"H"
TICK_FRAME = b"T"
EVENT_FRAME = b"E"
POLICY_FRAME = b"P"

TIMESTAMP_BYTES = 8
"""Ticks and events begin with the time, ns since 1970, little-endian."""

LIST_GROUPS = ("obs", "action", "noise", "limited")
"""Groups of columns written as JSON lists. The others are objects; those of ``tick`` are at the
top level."""

EVENT_SCHEMA = {"type": "object"}
TICK_SCHEMA = {
    "type": "object",
    "properties": {
        "reading": {
            "type": "object",
            "description": "the robot's reading, null where it gave no number",
        },
        "obs": {
            "type": "array",
            "items": {"type": "number"},
            "description": "the policy's observation",
        },
        "action": {
            "type": "array",
            "items": {"type": "number"},
            "description": "the policy's action, before any clip",
        },
        "asked": {"type": "object", "description": "the command that the action stands for"},
        "sent": {"type": "object", "description": "the command that the robot's driver sent"},
        "limited": {
            "type": "array",
            "items": {"type": "number"},
            "description": "bits: position, velocity, ...",
        },
    },
}


class LogRow:
    """One tick as a row of float64s; NaN is what has no value.

    ``row["obs"]`` is a view of the columns of group ``obs``, to be written into.

    Args:
        groups: Name of a group -> names of its columns.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        self.groups = {name: list(columns) for name, columns in groups.items()}
        self.data = np.full(sum(map(len, self.groups.values())), np.nan)
        self._views: dict[str, NDArray[np.float64]] = {}
        start = 0
        for name, columns in self.groups.items():
            end = start + len(columns)
            self._views[name] = self.data[start:end]
            start = end

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self._views[name]


class RunLog:
    """Write an MCAP file through a process of its own.

    Args:
        path: File to write.
        row: Row that ``write_tick`` writes, always the same object.
        about: Metadata: the policy, the robot, and the run's settings.

    Raises:
        BridgeError: the package mcap is missing, or the file cannot be written.
    """

    def __init__(self, path: Path, row: LogRow, about: Mapping[str, str]) -> None:
        if importlib.util.find_spec("mcap") is None:
            raise BridgeError("a log needs the package mcap: pip install mcap")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as e:
            raise BridgeError(f"cannot write {path}: {e.strerror or e}") from e
        self.path = path
        self._row = row
        # The writer inherits the open file, so that a bad path is an error here and not there
        self._writer = ChildProcess("tools.run_log", str(file), keep=(file,))
        os.close(file)
        self._writer.send_waiting(COLUMNS_FRAME, json.dumps(row.groups).encode())
        self._writer.send_waiting(POLICY_FRAME, json.dumps(dict(about)).encode())

    @property
    def dropped(self) -> int:
        """Number of ticks and events that are not in the log, as the writer could not keep up."""
        return self._writer.dropped

    def write_tick(self) -> None:
        """Write the row as it is now."""
        timestamp = time.time_ns().to_bytes(TIMESTAMP_BYTES, "little")
        self._writer.send(TICK_FRAME, timestamp + self._row.data.tobytes())

    def write_event(self, what: str, **facts: Any) -> None:
        """Write an event: its kind, and facts that JSON holds (arrays become lists)."""
        text = json.dumps({"what": what, **facts}, default=_to_list).encode()
        timestamp = time.time_ns().to_bytes(TIMESTAMP_BYTES, "little")
        self._writer.send(EVENT_FRAME, timestamp + text)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def _to_list(array: Any) -> Any:
    return np.asarray(array).tolist()


def write_mcap(source: BinaryIO, target: BinaryIO) -> None:
    """Write frames from ``source`` into an MCAP file until they end."""
    from mcap.writer import Writer

    writer = Writer(target, chunk_size=CHUNK_BYTES)
    writer.start(profile="", library="metarobot")
    channels: dict[str, int] = {}
    for topic, schema in ((TICK_TOPIC, TICK_SCHEMA), (EVENT_TOPIC, EVENT_SCHEMA)):
        name = f"metarobot{topic.replace('/', '.')}"
        schema_id = writer.register_schema(name, "jsonschema", json.dumps(schema).encode())
        channels[topic] = writer.register_channel(topic, "json", schema_id)

    groups: dict[str, list[str]] = {}
    for number, (kind, payload) in enumerate(read_frames(source)):
        if kind == COLUMNS_FRAME:
            groups = json.loads(payload)
            writer.add_metadata("groups", {"json": payload.decode()})
        elif kind == POLICY_FRAME:
            writer.add_metadata(POLICY_RECORD, json.loads(payload))
        else:
            time_ns = int.from_bytes(payload[:TIMESTAMP_BYTES], "little")
            content = payload[TIMESTAMP_BYTES:]
            if kind == TICK_FRAME:
                channel = channels[TICK_TOPIC]
                content = _tick_as_json(groups, np.frombuffer(content))
            else:
                channel = channels[EVENT_TOPIC]
            writer.add_message(channel, time_ns, content, time_ns, number)
    writer.finish()  # type: ignore[no-untyped-call]


def _tick_as_json(groups: Mapping[str, Sequence[str]], row: NDArray[np.float64]) -> bytes:
    """Return a row as JSON: numbers with all their digits, null for what is not finite."""
    values = [value if math.isfinite(value) else None for value in row.tolist()]
    tick: dict[str, Any] = {}
    start = 0
    for name, columns in groups.items():
        end = start + len(columns)
        part = values[start:end]
        start = end
        if name == "tick":
            tick.update(zip(columns, part, strict=True))
        elif name in LIST_GROUPS:
            tick[name] = part
        else:
            tick[name] = dict(zip(columns, part, strict=True))
    return json.dumps(tick, separators=(",", ":")).encode()


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``/tick``, ``/event`` or ``policy``, content), up to where the log ends or breaks off.

    Raises:
        BridgeError: the file cannot be read, or is no log.
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
                elif isinstance(record, Metadata) and record.name == POLICY_RECORD:
                    yield POLICY_RECORD, record.metadata
        except (McapError, struct.error, EOFError) as e:
            # After a channel it is a log that a kill cut off: what was read so far is valid
            if not topics:
                raise BridgeError(f"{path} is no log: {e}") from e


if __name__ == "__main__":
    with open(int(sys.argv[1]), "wb", buffering=0) as out:
        write_mcap(sys.stdin.buffer, out)
