"""Processes beside the loop, and the pipe to them that never makes the loop wait.

What would hold the interpreter (writing a log, drawing a panel), and what must outlive it (the
guard), is done in a process of its own. A frame is a kind, a length and so many bytes; a frame that
finds the pipe full is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO

HEAD = struct.Struct("<cI")
ROOM = 1 << 20
"""Bytes that a pipe holds: seconds of ticks."""


class Child:
    """A module of ours run in a process of its own, which survives Ctrl-C and ends when the pipe
    does.
    """

    def __init__(
        self, module: str, *arguments: str, keep: tuple[int, ...] = (), answers: bool = False
    ) -> None:
        command = [sys.executable, "-m", f"metarobot.bridge.{module}", *arguments]
        out = subprocess.PIPE if answers else None
        self.process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            pass_fds=keep,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None
        self._pipe = self.process.stdin.fileno()
        with contextlib.suppress(OSError):  # a small pipe works too
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, ROOM)
        os.set_blocking(self._pipe, False)
        self.dropped = 0
        """Frames that found the pipe full, or nobody at its other end."""
        self._rest = b""

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def send(self, kind: bytes, payload: bytes = b"") -> bool:
        """Send a frame without waiting; return whether it was taken."""
        if self._rest:
            self._rest = self._rest[self._write(self._rest) :]
        if self._rest:
            self.dropped += 1
            return False
        frame = HEAD.pack(kind, len(payload)) + payload
        written = self._write(frame)
        if not written:
            self.dropped += 1
            return False
        self._rest = frame[written:]  # one that was begun is finished before the next
        return True

    def insist(self, kind: bytes, payload: bytes, seconds: float = 2.0) -> None:
        """Send a frame that may take its time, outside of the loop's ticks."""
        end = time.monotonic() + seconds
        while self._rest and time.monotonic() < end:
            self._rest = self._rest[self._write(self._rest) :]
            time.sleep(1e-3)
        self.send(kind, payload)
        while self._rest and time.monotonic() < end:
            self._rest = self._rest[self._write(self._rest) :]
            time.sleep(1e-3)

    def close(self, seconds: float = 60.0) -> None:
        """Finish what was begun, close the pipe and wait for the process to end."""
        end = time.monotonic() + seconds
        while self._rest and self.alive and time.monotonic() < end:
            self._rest = self._rest[self._write(self._rest) :]
            time.sleep(1e-3)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._pipe, data)
        except BlockingIOError:
            return 0
        except OSError:
            return 0


def frames(source: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Read frames until the pipe ends, be it in the middle of one."""
    while len(head := source.read(HEAD.size)) == HEAD.size:
        kind, length = HEAD.unpack(head)
        payload = source.read(length)
        if len(payload) < length:
            return
        yield kind, payload
