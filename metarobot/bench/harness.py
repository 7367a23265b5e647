"""What all benches share: rounds in turns until the time is over, medians and ratios.

Everything that is compared takes one turn in each round, so that a busy machine slows all alike.
The first round warms up and is dropped.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress

from metarobot.errors import MetarobotError

Round = dict[str, float]
"""One round: name of what was measured -> its rate, steps a second, or its time, s."""


def check_sizes(worlds: int, seconds: float) -> None:
    """Raise ``MetarobotError`` unless there is something to measure, and time to do so."""
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")


def usable_threads(threads: int) -> int:
    """Return a number of threads, all that this process may use for 0."""
    return threads or len(os.sched_getaffinity(0))


def measure_rounds(
    measure: Callable[[], Round], seconds: float, *, least_rounds: int = 2, show: bool = True
) -> list[Round]:
    """Repeat a round of measurements until the time is over.

    Args:
        measure: Measures everything once, in turns.
        seconds: How long to go on, the warm-up included.
        least_rounds: Rounds to measure even if they take longer.
        show: Whether to show a progress bar.

    Returns:
        The rounds after the first.
    """
    rounds: list[Round] = []
    began = time.perf_counter()
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        while len(rounds) < 1 + least_rounds or time.perf_counter() - began < seconds:
            rounds.append(measure())
            bar.update(task, completed=time.perf_counter() - began)
    return rounds[1:]


def median(rounds: Sequence[Round], name: str) -> float:
    """Return the median of one measurement over the rounds."""
    return statistics.median(row[name] for row in rounds)


def median_ratio(rounds: Sequence[Round], name: str, other: str) -> float:
    """Return the median of the ratios of two measurements, each within one round."""
    return statistics.median(row[name] / row[other] for row in rounds)


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[Any, float]:
    """Do some work; return its result and the seconds it took, on a device to its end."""
    _wait_for(device)
    began = time.perf_counter()
    result = work()
    _wait_for(device)
    return result, time.perf_counter() - began


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """Return the name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else device
