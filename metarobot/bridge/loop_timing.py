"""Timing of the control loop: absolute deadlines, and who is to blame for a missed one.

Ticks start at absolute deadlines, one control period apart. A deadline is *missed* when a tick ends
after the next tick's deadline. Of the time from a tick's start to its end the loop's **own** share
is

- the CPU time of its thread, if it never waited (no voluntary context switch), or else
- all of the time but that in the kernel's run queue: what it waits for is its own doing.

The rest is the **host's**: waking late, being preempted, CPU time stolen by other virtual machines,
a simulated robot whose reading is late. A miss is the loop's own if its own share alone is at least
one period. A control loop that is too slow and a computer that is too busy need different cures.
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

SPIN_S = 3e-4
"""How long before a deadline to stop sleeping and poll the clock: sleeps end 0.1 ms late or so."""
SWITCH_INTERVAL_S = 1e-4
"""How soon another Python thread must hand the interpreter over; the default is 5 ms."""
HISTOGRAM_EDGES_MS = np.concatenate(
    [np.arange(0, 2, 0.01), np.arange(2, 20, 0.1), np.arange(20, 1020, 10), [np.inf]]
)
"""Upper edges of the histograms' bins: 0.01 ms wide below 2 ms, 0.1 ms below 20 ms, then 10 ms."""
REPORTED_QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""Name in the report -> quantile."""


class LoopClock(Protocol):
    """Time as the control loop knows it."""

    def now(self) -> float:
        """Return the time, s; it never goes back."""

    def sleep_until(self, deadline: float) -> None:
        """Return at a time, or at once if it has passed."""


class MonotonicClock:
    """The machine's monotonic clock."""

    now = staticmethod(time.monotonic)

    def sleep_until(self, deadline: float) -> None:
        """Sleep, and poll the clock for the last ``SPIN_S``."""
        left_s = deadline - time.monotonic() - SPIN_S
        if left_s > 0:
            time.sleep(left_s)
        while time.monotonic() < deadline:
            pass


class SteppedClock:
    """A clock that moves only when somebody waits for it, and then at once.

    It is for robots in lock-step, which simulate as fast as they can, and for tests.
    """

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return how far the clock has been moved, s."""
        return self.time

    def sleep_until(self, deadline: float) -> None:
        """Move the clock to the deadline."""
        self.time = max(self.time, deadline)


class TimeHistogram:
    """Quantiles of any number of durations, in fixed memory."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(HISTOGRAM_EDGES_MS), np.int64)
        self.largest_s = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.largest_s = max(self.largest_s, seconds)
        self.counts[HISTOGRAM_EDGES_MS.searchsorted(1e3 * seconds)] += 1

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Return upper bounds of quantiles, s, as fine as the bins."""
        cumulative = self.counts.cumsum()
        bins = cumulative.searchsorted(np.multiply(shares, cumulative[-1]))
        edges_s = HISTOGRAM_EDGES_MS[bins] / 1e3
        return [min(edge, self.largest_s) for edge in edges_s.tolist()]


class CpuUsage:
    """The kernel's figures of the calling thread."""

    def __init__(self) -> None:
        # Opened once: reading an open file is a single system call per tick
        try:
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            # A kernel without scheduler statistics
            self._schedstat = -1

    def read(self) -> tuple[float, int, float]:
        """Return CPU time, s, voluntary context switches, and time in the run queue, s.

        The run queue's time is 0 where the kernel does not count it.
        """
        queued_s = 0.0
        if self._schedstat >= 0:
            queued_ns = int(os.pread(self._schedstat, 64, 0).split()[1])
            queued_s = queued_ns * 1e-9
        switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        return time.thread_time(), switches, queued_s

    def close(self) -> None:
        """Close the kernel's file."""
        if self._schedstat >= 0:
            os.close(self._schedstat)
            self._schedstat = -1


class LoopTimer:
    """Start ticks at a fixed rate and count missed deadlines.

    Call ``wait`` before each tick and ``finish_tick`` after it, in one thread.

    Args:
        clock: Time to use.
        period_s: Control period.
    """

    def __init__(self, clock: LoopClock, period_s: float) -> None:
        self.clock = clock
        self.period_s = period_s
        self.ticks = 0
        """Number of ticks."""
        self.missed_own = 0
        """Deadlines missed because the loop's own share was too long."""
        self.missed_host = 0
        """Deadlines missed because of the host."""
        self.start_delays = TimeHistogram()
        """How late ticks started."""
        self.durations = TimeHistogram()
        """How long ticks took."""
        self.own_largest_s = 0.0
        """The longest own share of a tick."""
        self._usage = CpuUsage()
        self._usage_at_start = (0.0, 0, 0.0)
        self._stolen_at_start_s = stolen_cpu_s()
        self._deadline = 0.0
        self._tick_started = 0.0
        self.restart()

    def restart(self) -> None:
        """Count deadlines from now on."""
        self._deadline = self.clock.now()

    def wait(self, await_reading: Callable[[], None] = lambda: None) -> float:
        """Wait for the next tick, then for its reading; return how late the tick started, s.

        The time in ``await_reading`` is the robot's, so it is no part of the tick's duration.
        """
        self._deadline += self.period_s
        self.clock.sleep_until(self._deadline)
        delay_s = max(self.clock.now() - self._deadline, 0.0)
        await_reading()
        self._usage_at_start = self._usage.read()
        self._tick_started = self.clock.now()
        self.start_delays.add(delay_s)
        return delay_s

    def finish_tick(self) -> float:
        """Account for the tick that ends; return its duration, s.

        Deadlines that have passed are skipped, never made up for: two commands in quick succession
        would be worse for the robot than one that is missing.
        """
        now = self.clock.now()
        duration_s = now - self._tick_started
        missed = int((now - self._deadline) / self.period_s)
        self.ticks += 1
        self.durations.add(duration_s)

        # The own share is a part of the duration: unless that is a record or a deadline was missed,
        # the system calls that tell the share are saved
        if duration_s > self.own_largest_s or missed:
            own_s = self._own_share_s(duration_s)
            self.own_largest_s = max(self.own_largest_s, own_s)
            if own_s >= self.period_s:
                self.missed_own += missed
            else:
                self.missed_host += missed
            self._deadline += missed * self.period_s
        return duration_s

    def _own_share_s(self, duration_s: float) -> float:
        cpu_s, switches, queued_s = self._usage.read()
        cpu_before_s, switches_before, queued_before_s = self._usage_at_start
        cpu_s -= cpu_before_s
        if switches == switches_before:
            return cpu_s
        return max(duration_s - (queued_s - queued_before_s), cpu_s)

    def close(self) -> None:
        """Close the kernel's file."""
        self._usage.close()

    def report(self) -> dict[str, float]:
        """Return all figures, times in ms."""
        report: dict[str, float] = {
            "ticks": self.ticks,
            "missed_own": self.missed_own,
            "missed_host": self.missed_host,
            "own_max_ms": 1e3 * self.own_largest_s,
        }
        for name, histogram in (("late", self.start_delays), ("work", self.durations)):
            quantiles_s = histogram.quantiles(list(REPORTED_QUANTILES.values()))
            for quantile, seconds in zip(REPORTED_QUANTILES, quantiles_s, strict=True):
                report[f"{name}_{quantile}_ms"] = 1e3 * seconds
            report[f"{name}_max_ms"] = 1e3 * histogram.largest_s
        return report

    @property
    def stolen_s(self) -> float:
        """CPU time that other virtual machines took since this timer was made, s."""
        return stolen_cpu_s() - self._stolen_at_start_s


def stolen_cpu_s() -> float:
    """Return the CPU time other virtual machines took from this one since it started, s.

    0 where the kernel does not count it.
    """
    try:
        with open("/proc/stat", "rb") as file:
            stolen_ticks = int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0.0
    return stolen_ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def without_gc_pauses() -> Iterator[None]:
    """Keep the garbage collector and other Python threads from holding up the control loop.

    Collections are off but for ``collect_garbage``, and objects alive now are never scanned again.
    Another thread that computes hands the interpreter over within ``SWITCH_INTERVAL_S``.
    """
    interval_s = sys.getswitchinterval()
    collecting = gc.isenabled()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.unfreeze()
        if collecting:
            gc.enable()


def collect_garbage() -> None:
    """Free what hangs in reference cycles: between two episodes, where a pause does no harm.

    The control loop makes none itself, but a driver or a policy of somebody else's may. It takes a
    millisecond or so, as it scans only what was made since ``without_gc_pauses`` began.
    """
    gc.collect()
