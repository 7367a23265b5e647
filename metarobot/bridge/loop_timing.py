"""The beat of the loop: absolute deadlines, and whose fault it is when one is missed.

Of the time from a tick's deadline to its end the loop's **own** share is the CPU time of its
thread, or, if it waited for anything in between (a voluntary context switch), all that passed but
the time in the run queue. The rest is the **host's**: waking late, being preempted, stolen time of
a virtual machine, a simulated robot whose reading is late. A deadline is missed if the tick ends
after the next tick's deadline; the miss is the loop's own if its own share alone is longer than a
period.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

SPIN = 3e-4
"""How long before a deadline to stop sleeping and look at the clock instead, s: sleeps end late by
about 0.1 ms."""
BINS = np.concatenate(
    [np.arange(0, 2, 0.01), np.arange(2, 20, 0.1), np.arange(20, 1020, 10), [np.inf]]
)
"""Edges of the histograms of lateness and work, ms."""
SHARES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""Quantiles that are reported."""


class Clock(Protocol):
    """Time as the loop knows it."""

    def now(self) -> float:
        """Return the time, s; it never goes back."""

    def sleep_until(self, deadline: float) -> None:
        """Return at a time, or at once if it has passed."""


class Monotonic:
    """The machine's monotonic clock."""

    now = staticmethod(time.monotonic)

    def sleep_until(self, deadline: float) -> None:
        """Sleep, and spin for the last bit."""
        left = deadline - time.monotonic() - SPIN
        if left > 0:
            time.sleep(left)
        while time.monotonic() < deadline:
            pass


class Stepped:
    """A clock that moves only when it is waited for, as fast as that may be: for robots in
    lock-step.
    """

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return how far the clock has been moved."""
        return self.time

    def sleep_until(self, deadline: float) -> None:
        """Be there at once."""
        self.time = max(self.time, deadline)


class Histogram:
    """Quantiles of ever so many times in fixed memory, as fine as 0.01 ms below 2 ms."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(BINS), np.int64)
        self.largest = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.largest = max(self.largest, seconds)
        self.counts[BINS.searchsorted(1e3 * seconds)] += 1

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Return upper bounds, s, as fine as the bins."""
        sums = self.counts.cumsum()
        edges = BINS[sums.searchsorted(np.multiply(shares, sums[-1]))] / 1e3
        return [min(edge, self.largest) for edge in edges.tolist()]


class Usage:
    """What the kernel says of the calling thread: CPU time, voluntary switches, time in the run
    queue.
    """

    def __init__(self) -> None:
        try:
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:  # a kernel without scheduler statistics
            self._file = -1

    def read(self) -> tuple[float, int, float]:
        """Return seconds of CPU, voluntary switches, seconds in the run queue (0 where the kernel
        does not say).
        """
        queued = 0.0 if self._file < 0 else int(os.pread(self._file, 64, 0).split()[1]) * 1e-9
        return time.thread_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw, queued

    def close(self) -> None:
        """Close the kernel's file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Pace:
    """Ticks at a fixed rate, counted; ``wait`` before each, ``done`` after each."""

    def __init__(self, clock: Clock, period: float) -> None:
        self.clock, self.period = clock, period
        self.ticks = self.own = self.host = 0
        """Ticks; deadlines missed by the loop's own fault, and by the host's."""
        self.late, self.work = Histogram(), Histogram()
        """How late ticks began, and how long they took."""
        self.own_largest = 0.0
        """The longest own share of a tick, s."""
        self._usage, self._stolen = Usage(), stolen()
        self._deadline, self._first = 0.0, 0.0
        self._before = (0.0, 0, 0.0)
        self.begin()

    def begin(self) -> None:
        """Start the beat anew, from now."""
        self._deadline = self.clock.now()

    def wait(self, heard: Callable[[], None] = lambda: None) -> float:
        """Wait for the next tick, and then until ``heard`` returns; return how late the tick
        begins, s.
        """
        self._deadline += self.period
        self.clock.sleep_until(self._deadline)
        late = max(self.clock.now() - self._deadline, 0.0)
        heard()
        self._before, self._began = self._usage.read(), self.clock.now()
        self.late.add(late)
        return late

    def done(self) -> float:
        """Account for the tick; return what it took, s. Deadlines that have passed are skipped,
        never made up for.
        """
        now = self.clock.now()
        took, missed = now - self._began, int((now - self._deadline) / self.period)
        self.ticks += 1
        self.work.add(took)
        if (
            took > self.own_largest or missed
        ):  # else its own share, which is a part of it, is of no interest
            own = self._own(took)
            self.own_largest = max(self.own_largest, own)
            if own >= self.period:
                self.own += missed
            else:
                self.host += missed
            self._deadline += missed * self.period
        return took

    def _own(self, took: float) -> float:
        """Return the loop's own share of a tick, s."""
        cpu, waited, queued = (a - b for a, b in zip(self._usage.read(), self._before, strict=True))
        return cpu if not waited else max(took - queued, cpu)

    def close(self) -> None:
        """Let go of the kernel's file."""
        self._usage.close()

    def report(self) -> dict[str, float]:
        """Return the figures, times in ms."""
        counts = {"ticks": self.ticks, "missed_own": self.own, "missed_host": self.host}
        figures = {"own_max_ms": 1e3 * self.own_largest}
        for name, times in (("late", self.late), ("work", self.work)):
            found = times.quantiles(list(SHARES.values()))
            figures |= {
                f"{name}_{k}_ms": 1e3 * seconds for k, seconds in zip(SHARES, found, strict=True)
            }
            figures[f"{name}_max_ms"] = 1e3 * times.largest
        return counts | figures

    @property
    def stolen(self) -> float:
        """CPU time that other virtual machines took from this one since the beat began, s."""
        return stolen() - self._stolen


def stolen() -> float:
    """Return the CPU time that other virtual machines took from this one since it started, s."""
    try:
        with open("/proc/stat", "rb") as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector and other threads from holding up the loop.

    What is alive now is never looked at again; a thread that computes hands over within 0.1 ms
    instead of 5.
    """
    interval, enabled = sys.getswitchinterval(), gc.isenabled()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
        if enabled:
            gc.enable()
