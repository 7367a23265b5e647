"""Statistics over training seeds and tasks, with bootstrap intervals (Agarwal et al. 2021).

Arrays of returns are ``(run, task)`` or ``(run, episode, task)``: one run a training seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from metarobot.types import Floats

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""
CONFIDENCE = 0.95
"""Level of every interval that a report calls ``ci95``."""
BOOTSTRAP_SEED = 0
"""Seed of the resampling: the same returns give the same interval."""

UPPER_REFERENCE = "oracle"
"""Name, in reports, of the reference that is shown the task."""
LOWER_REFERENCE = "blind"
"""Name, in reports, of the reference that cannot adapt."""


def iqm(x: Floats) -> float:
    """Return the interquartile mean, the mean of the middle half of all values."""
    ordered = np.sort(x, axis=None)
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    return float(middle.mean())


def worst_tenth(x: Floats) -> float:
    """Return the mean over the worst tenth of tasks, at least one, after averaging the seeds."""
    task_means = np.sort(x.mean(axis=0))
    count = max(1, len(task_means) // 10)
    return float(task_means[:count].mean())


def bootstrap_interval(
    x: Floats, statistic: Callable[[Floats], Any], level: float = CONFIDENCE
) -> list[float]:
    """Return the percentile bootstrap interval of a statistic of ``(run, task)``.

    The bootstrap is stratified: tasks are resampled within each run (Agarwal et al. 2021, sec. 4).
    """
    rng = np.random.Generator(np.random.PCG64(BOOTSTRAP_SEED))
    tasks = x.shape[1]
    draws = []
    for _ in range(RESAMPLES):
        columns = rng.integers(tasks, size=x.shape)
        resampled = np.take_along_axis(x, columns, axis=1)
        draws.append(float(statistic(resampled)))

    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return [float(low), float(high)]


def summarise(x: Floats) -> dict[str, Any]:
    """Summarise the returns ``(run, task)`` of one episode."""
    return {
        "mean": float(x.mean()),
        "iqm": iqm(x),
        "ci95": bootstrap_interval(x, np.mean),
        "iqm_ci95": bootstrap_interval(x, iqm),
        "worst10": worst_tenth(x),
    }


def episode_rows(returns: Floats) -> list[dict[str, Any]]:
    """Summarise returns ``(run, episode, task)``, one row an episode.

    Rows after the first also hold the gain over the first episode, task by task.
    """
    rows = []
    for k in range(returns.shape[1]):
        row: dict[str, Any] = {"episode": k, **summarise(returns[:, k])}
        if k > 0:
            gain = returns[:, k] - returns[:, 0]
            row["gain"] = float(gain.mean())
            row["gain_ci95"] = bootstrap_interval(gain, np.mean)
        rows.append(row)
    return rows


def success_rows(success: Floats) -> list[dict[str, Any]]:
    """Return the success rate of each episode and its interval, from ``(run, episode, task)``."""
    rows = []
    for k in range(success.shape[1]):
        rate = success[:, k]
        rows.append({"mean": float(rate.mean()), "ci95": bootstrap_interval(rate, np.mean)})
    return rows


def adaptation_score(agent: Floats, oracle: Floats, blind: Floats) -> dict[str, Any]:
    """Return the adaptation score and its interval over resampled tasks.

    Takes the returns ``(run, task)`` of one episode. The score is 0 for a policy that cannot adapt
    and 1 for one that is shown the task; it is NaN where these two do not differ.
    """
    # Average the seeds first: (agent, oracle, blind) x task.
    task_means = np.stack([returns.mean(axis=0) for returns in (agent, oracle, blind)])
    tasks = task_means.shape[1]

    rng = np.random.Generator(np.random.PCG64(BOOTSTRAP_SEED))
    draws = []
    for _ in range(RESAMPLES):
        columns = rng.integers(tasks, size=tasks)
        draws.append(_score(task_means[:, columns]))

    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return {"score": _score(task_means), "score_ci95": [float(low), float(high)]}


def _score(task_means: Floats) -> float:
    """Return the score of returns ``(3, task)``: those of agent, oracle and blind policy."""
    agent, oracle, blind = task_means.mean(axis=1)
    if abs(oracle - blind) <= 1e-9:
        return float("nan")
    # score = (agent − blind) / (oracle − blind)
    return float((agent - blind) / (oracle - blind))
