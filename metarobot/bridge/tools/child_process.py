"""Child processes beside the control loop, and pipes to them that never make the loop wait.

What would hold Python's interpreter lock (writing a log, drawing a panel) and what must outlive the
controller (the guard process) runs in a process of its own. A frame in the pipe is a kind (one
byte), a length, and as many bytes. A frame that finds the pipe full is dropped: late control is
worse than a missing line in a log.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from typing import BinaryIO

from metarobot.bridge.tools.python_command import child_environment, python_command

FRAME_HEADER = struct.Struct("<cI")
"""Kind, and number of bytes that follow."""
PIPE_BYTES = 1 << 20
"""Capacity asked of the kernel: seconds of control steps."""
RETRY_S = 1e-3
"""Interval between attempts to write into a full pipe, outside of the control loop's ticks."""


class ChildProcess:
    """A module of this package in a process of its own, which ends when the pipe to it does.

    It runs in a session of its own, so Ctrl-C in the terminal does not reach it.

    Args:
        module: Module below ``metarobot.bridge``.
        arguments: Its command line.
        keep: File descriptors that it inherits.
        answers: Whether its standard output is a pipe to this process.
    """

    def __init__(
        self, module: str, *arguments: str, keep: tuple[int, ...] = (), answers: bool = False
    ) -> None:
        command = python_command(f"metarobot.bridge.{module}", *arguments)
        self.process = subprocess.Popen(  # noqa: S603
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if answers else None,
            pass_fds=keep,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None
        self._pipe = self.process.stdin.fileno()
        # An ordinary user may be refused a large pipe; a small one works too, and drops earlier
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._pipe, False)
        self.dropped = 0
        """Frames that found the pipe full, or nobody at its other end."""
        self._unwritten = b""
        """The end of a frame of which the pipe took only the beginning."""

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def send(self, kind: bytes, payload: bytes = b"") -> bool:
        """Send a frame without waiting; return whether it was taken."""
        # A frame that was begun must be finished before the next, or the reader loses its place
        if self._unwritten:
            self._write_rest()
        if self._unwritten:
            self.dropped += 1
            return False

        frame = FRAME_HEADER.pack(kind, len(payload)) + payload
        written = self._write(frame)
        if not written:
            self.dropped += 1
            return False
        self._unwritten = frame[written:]
        return True

    def send_waiting(self, kind: bytes, payload: bytes, timeout_s: float = 2.0) -> None:
        """Send a frame that must not be dropped; not for use in the control loop's ticks."""
        end = time.monotonic() + timeout_s
        self._write_rest_until(end)
        self.send(kind, payload)
        self._write_rest_until(end)

    def read_answer(self) -> bytes:
        """Return what came on the process's standard output since the last read; never wait."""
        if self.process.stdout is None:
            return b""
        os.set_blocking(self.process.stdout.fileno(), False)
        return self.process.stdout.read() or b""

    def close(self, timeout_s: float = 60.0) -> bytes:
        """Finish the frame that was begun, close the pipe, and wait for the process to end.

        After ``timeout_s`` it is killed. Returns what it answered last.
        """
        end = time.monotonic() + timeout_s
        while self._unwritten and self.alive and time.monotonic() < end:
            self._write_rest()
            time.sleep(RETRY_S)

        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(max(end - time.monotonic(), RETRY_S))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        answer = self.read_answer()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return answer

    def _write_rest_until(self, end: float) -> None:
        while self._unwritten and time.monotonic() < end:
            self._write_rest()
            time.sleep(RETRY_S)

    def _write_rest(self) -> None:
        self._unwritten = self._unwritten[self._write(self._unwritten) :]

    def _write(self, data: bytes) -> int:
        """Return how many bytes the pipe took: 0 if it is full or the process is gone."""
        try:
            return os.write(self._pipe, data)
        except OSError:
            return 0


def read_frames(source: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, payload) until the pipe ends, be it in the middle of a frame."""
    while True:
        header = source.read(FRAME_HEADER.size)
        if len(header) < FRAME_HEADER.size:
            return
        kind, length = FRAME_HEADER.unpack(header)
        payload = source.read(length)
        if len(payload) < length:
            return
        yield kind, payload
