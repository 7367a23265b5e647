"""Emergency stop: any key, SIGINT, SIGTERM and SIGHUP damp the robot, whatever the loop is doing.

Python runs its own signal handlers between two bytecodes of the main thread: never, if a policy or
a driver does not return. But the interpreter's C handler writes each signal's number into a pipe
(``signal.set_wakeup_fd``) at once. ``GateWatchdog`` reads that pipe, and the terminal, in a thread
of its own, and closes the command gate. So a policy that never returns is stopped too.
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

StopSource = tuple[int, Callable[[bytes], str]]
"""A file descriptor, and what bytes read there mean: a reason to stop, or an empty string."""


class StopSignals(NamedTuple):
    """What a watchdog has to read, and how to restore the terminal before a hard exit."""

    sources: list[StopSource]
    restore_terminal: Callable[[], None]


@contextmanager
def stop_signals(keys: bool = True) -> Iterator[StopSignals]:
    """Turn keys and signals into sources for a ``GateWatchdog``.

    On exit the terminal's settings and the signal handlers are what they were before. Signals are
    caught only in the main thread, keys only if standard input is a terminal and ``keys`` is true.
    """
    has_terminal = keys and sys.stdin is not None and sys.stdin.isatty()
    terminal = sys.stdin.fileno() if has_terminal else -1
    settings = termios.tcgetattr(terminal) if has_terminal else []

    def restore_terminal() -> None:
        if has_terminal:
            termios.tcsetattr(terminal, termios.TCSANOW, settings)

    with contextlib.ExitStack() as stack:
        stack.callback(restore_terminal)
        sources: list[StopSource] = []
        # Python allows signal handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            sources.append(stack.enter_context(_signal_source()))
        if has_terminal:
            # Keys arrive one by one, without Enter and without echo; Ctrl-C is still a signal
            tty.setcbreak(terminal, termios.TCSANOW)
            sources.append((terminal, lambda data: "a key was pressed"))
        yield StopSignals(sources, restore_terminal)


@contextmanager
def _signal_source() -> Iterator[StopSource]:
    """Have the interpreter write the number of each stop signal into a pipe."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    # A Python handler must be installed, or the signal would end the process; it does nothing
    handlers = {number: signal.signal(number, lambda *args: None) for number in SIGNALS}
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader, _signal_name
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _signal_name(data: bytes) -> str:
    """Return the name of the first stop signal in ``data``, or an empty string."""
    for number in data:
        if number in SIGNALS:
            return signal.Signals(number).name
    return ""
