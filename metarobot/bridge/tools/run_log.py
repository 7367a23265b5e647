"""The log of a run: every tick as JSON in an MCAP file, which Foxglove and PlotJuggler open too.

The control loop hands each tick to a process that writes it, and never waits for it. If that
process is killed the log is readable up to its last chunk, half a second or so; if only the
controller is killed the log is complete. A long log is split into parts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.tools.child_process import ChildProcess, read_frames
from metarobot.bridge.tools.log_format import (
    EVENT_TOPIC,
    GROUPS_RECORD,
    POLICY_RECORD,
    TICK_TOPIC,
    later_parts,
    part_path,
)

DEFAULT_PART_MB = 64.0
"""An hour of a Go2 at 50 Hz has about 207 MB."""
DEFAULT_MAX_MB = 2000.0
CLOSE_TIMEOUT_S = 5.0
"""How long the writer may take to finish the file at the end of a run."""
MAX_DROPPED_SHARE = 0.01
"""Share of ticks and events that may be missing in a log that counts as complete."""
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
    """Write MCAP files through a process of its own.

    Nothing in here raises once the log is open: a log that fails must not keep the robot from being
    damped. ``check`` raises, where the control loop can bear it.

    Args:
        path: File to write; the parts after it are ``run.part2.mcap``, ...
        row: Row that ``write_tick`` writes, always the same object.
        about: Metadata: the policy, the robot, and the run's settings.
        part_mb: Size at which the next part begins, MB.
        max_mb: Size of all parts at which the oldest but the first are deleted, MB.

    Raises:
        BridgeError: the package mcap is missing, or the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        row: LogRow,
        about: Mapping[str, str],
        part_mb: float = DEFAULT_PART_MB,
        max_mb: float = DEFAULT_MAX_MB,
    ) -> None:
        if importlib.util.find_spec("mcap") is None:
            raise BridgeError("a log needs the package mcap: pip install mcap")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as e:
            raise BridgeError(f"cannot write {path}: {e.strerror or e}") from e
        for _, part in later_parts(path):
            # Parts of an earlier log of the same name would be read as parts of this one
            with contextlib.suppress(OSError):
                part.unlink()

        self.path = path
        self.failure = ""
        """Why the log is not complete; empty while it is."""
        self.frames = 0
        """Number of ticks and events so far."""
        self._row = row
        # The writer inherits the open file, so that a bad path is an error here and not there
        sizes = [str(int(1e6 * megabytes)) for megabytes in (part_mb, max_mb)]
        self._writer = ChildProcess(
            "tools.run_log", str(file), str(path.absolute()), *sizes, keep=(file,), answers=True
        )
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
        self._send(TICK_FRAME, timestamp + self._row.data.tobytes())

    def write_event(self, what: str, **facts: Any) -> None:
        """Write an event: its kind, and facts that JSON holds (arrays become lists)."""
        text = json.dumps({"what": what, **facts}, default=_to_list).encode()
        timestamp = time.time_ns().to_bytes(TIMESTAMP_BYTES, "little")
        self._send(EVENT_FRAME, timestamp + text)

    def check(self) -> None:
        """Raise ``BridgeError`` if the log cannot be written any more, as when the disk is full."""
        if self.failure:
            raise BridgeError(self.failure)

    def close(self) -> None:
        """Finish the file, within ``CLOSE_TIMEOUT_S``; whatever is wrong with it is in ``failure``.

        A writer that somebody has stopped is woken.
        """
        with contextlib.suppress(OSError):
            self._writer.process.send_signal(signal.SIGCONT)
        answer = self._writer.close(CLOSE_TIMEOUT_S)
        if self.failure:
            return
        code = self._writer.process.returncode
        if code != 0:
            self.failure = self._describe_end(answer, code)
        elif self.dropped > MAX_DROPPED_SHARE * self.frames:
            self.failure = (
                f"{self.dropped} of {self.frames} steps are missing in the log {self.path.name}: "
                "its writer was stopped, or the disk is too slow"
            )

    def _send(self, kind: bytes, payload: bytes) -> None:
        self.frames += 1
        if self._writer.send(kind, payload) or self.failure:
            return
        # The pipe is full, which costs this frame, or the writer has ended, which ends the log
        if not self._writer.alive:
            answer = self._writer.read_answer()
            self.failure = self._describe_end(answer, self._writer.process.returncode)

    def _describe_end(self, answer: bytes, code: int) -> str:
        reason = answer.decode(errors="replace").strip().splitlines()
        said = reason[-1] if reason else f"its process ended with {code}"
        return f"the log {self.path.name} cannot be written: {said}"


def _to_list(array: Any) -> Any:
    return np.asarray(array).tolist()


def write_mcap(source: BinaryIO, parts: LogParts) -> None:
    """Write frames from ``source`` into MCAP files until they end."""
    groups: dict[str, list[str]] = {}
    for number, (kind, payload) in enumerate(read_frames(source)):
        if kind == COLUMNS_FRAME:
            groups = json.loads(payload)
            parts.add_metadata(GROUPS_RECORD, {"json": payload.decode()})
        elif kind == POLICY_FRAME:
            parts.add_metadata(POLICY_RECORD, json.loads(payload))
        else:
            time_ns = int.from_bytes(payload[:TIMESTAMP_BYTES], "little")
            content = payload[TIMESTAMP_BYTES:]
            if kind == TICK_FRAME:
                content = _tick_as_json(groups, np.frombuffer(content))
            parts.add_message(
                TICK_TOPIC if kind == TICK_FRAME else EVENT_TOPIC, time_ns, content, number
            )
    parts.close()


class LogParts:
    """MCAP files of limited size, of which the oldest but the first are deleted in time.

    Each part is a whole file with all metadata. The first stays: it has the beginning of the run.

    Args:
        first: The first part, open for writing without a buffer.
        path: Its path, from which those of the other parts are made.
        part_bytes: Size at which the next part begins.
        max_bytes: Size of all parts at which old ones are deleted.
    """

    def __init__(
        self,
        first: io.RawIOBase,
        path: Path,
        part_bytes: float = math.inf,
        max_bytes: float = math.inf,
    ) -> None:
        self._path = path
        self._part_bytes = part_bytes
        self._max_bytes = max_bytes
        self._metadata: dict[str, dict[str, str]] = {}
        self._number = 1
        self._kept: dict[int, int] = {}
        """Number of a finished part that is still there -> its size."""
        self._begin(first)

    def add_metadata(self, name: str, entries: dict[str, str]) -> None:
        """Write a metadata record, into this part and all that follow."""
        self._metadata[name] = entries
        self._writer.add_metadata(name, entries)

    def add_message(self, topic: str, time_ns: int, content: bytes, number: int) -> None:
        """Write a message; begin the next part if this one is large enough."""
        self._writer.add_message(self._channels[topic], time_ns, content, time_ns, number)
        if self._file.tell() >= self._part_bytes:
            self._begin_next()

    def close(self) -> None:
        """Finish the last part."""
        self._writer.finish()
        self._file.flush()

    def _begin_next(self) -> None:
        self.close()
        self._kept[self._number] = self._file.tell()
        self._file.close()
        while len(self._kept) > 1 and sum(self._kept.values()) > self._max_bytes - self._part_bytes:
            oldest = sorted(self._kept)[1]
            part_path(self._path, oldest).unlink(missing_ok=True)
            del self._kept[oldest]
        self._number += 1
        self._begin(io.FileIO(part_path(self._path, self._number), "w"))

    def _begin(self, file: io.RawIOBase) -> None:
        from mcap.writer import Writer

        self._file = file
        # With checksums over all data, so that damage is noticed when it is read
        self._writer: Any = Writer(
            cast(BinaryIO, file), chunk_size=CHUNK_BYTES, enable_data_crcs=True
        )
        self._writer.start(profile="", library="metarobot")
        self._channels: dict[str, int] = {}
        for topic, schema in ((TICK_TOPIC, TICK_SCHEMA), (EVENT_TOPIC, EVENT_SCHEMA)):
            name = f"metarobot{topic.replace('/', '.')}"
            schema_id = self._writer.register_schema(
                name, "jsonschema", json.dumps(schema).encode()
            )
            self._channels[topic] = self._writer.register_channel(topic, "json", schema_id)
        for name, entries in self._metadata.items():
            self._writer.add_metadata(name, entries)


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


def main(file: str, path: str, part_bytes: str, max_bytes: str) -> None:
    """Write what comes through standard input; say on standard output why it cannot be written."""
    try:
        first = io.FileIO(int(file), "w")
        write_mcap(sys.stdin.buffer, LogParts(first, Path(path), int(part_bytes), int(max_bytes)))
    except OSError as e:
        os.write(sys.stdout.fileno(), f"{e.strerror or e}\n".encode())
        # Without a last attempt to write what is buffered
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
