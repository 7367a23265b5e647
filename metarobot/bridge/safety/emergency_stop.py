"""The emergency stop: any key, SIGINT, SIGTERM and SIGHUP, whatever the loop is doing.

Python's own signal handlers wait until the loop lets them; a byte written by the interpreter's C
handler does not, and the thread that watches the gate reads it. So a policy that never returns is
stopped too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Sign = tuple[int, Callable[[bytes], str]]
"""A file, and what a byte read there means: a reason to stop, or nothing."""


class Signs(NamedTuple):
    """Files to watch, and how to give the terminal back in a hurry."""

    files: list[Sign]
    restore: Callable[[], None]


@contextmanager
def signs(keys: bool = True) -> Iterator[Signs]:
    """Lend the files that a ``Watch`` is to look at; terminal and signal handlers are what they
    were afterwards.
    """
    terminal = sys.stdin.fileno() if keys and sys.stdin is not None and sys.stdin.isatty() else -1
    before = termios.tcgetattr(terminal) if terminal >= 0 else []

    def restore() -> None:
        if terminal >= 0:
            termios.tcsetattr(terminal, termios.TCSANOW, before)

    with contextlib.ExitStack() as stack:
        stack.callback(restore)
        found: list[Sign] = []
        if threading.current_thread() is threading.main_thread():
            found.append(stack.enter_context(_signals()))
        if terminal >= 0:
            tty.setcbreak(
                terminal, termios.TCSANOW
            )  # keys come one by one and unseen; Ctrl-C is still a signal
            found.append((terminal, lambda data: "a key was pressed"))
        yield Signs(found, restore)


@contextmanager
def _signals() -> Iterator[Sign]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {s: signal.signal(s, lambda number, frame: None) for s in SIGNALS}
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader, _signalled
    finally:
        signal.set_wakeup_fd(old)
        for s, handler in before.items():
            signal.signal(s, handler)
        os.close(reader)
        os.close(writer)


def _signalled(data: bytes) -> str:
    names = [signal.Signals(number).name for number in data if number in SIGNALS]
    return names[0] if names else ""
