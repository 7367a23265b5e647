"""Statistics of what several training seeds got in many tasks, with bootstrap intervals (Agarwal et
al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from metarobot.types import Floats

RESAMPLES = 2000


def iqm(x: Floats) -> float:
    """Interquartile mean: the mean of the middle half of all values (Agarwal et al. 2021)."""
    flat = np.sort(x, axis=None)
    cut = len(flat) // 4
    return float(flat[cut : len(flat) - cut].mean())


def worst_tenth(x: Floats) -> float:
    """Mean over the worst tenth of tasks, at least one, after averaging the seeds."""
    tasks = np.sort(x.mean(0))
    return float(tasks[: max(1, len(tasks) // 10)].mean())


def bootstrap_interval(
    x: Floats, statistic: Callable[[Floats], Any], level: float = 0.95
) -> list[float]:
    """Bootstrap interval of a statistic of ``(run, task)``: tasks are resampled within each run."""
    rng = np.random.Generator(np.random.PCG64(0))
    draws = [float(statistic(_resample(x, rng))) for _ in range(RESAMPLES)]
    tail = (1 - level) / 2
    return [float(q) for q in np.quantile(draws, [tail, 1 - tail])]


def _resample(x: Floats, rng: np.random.Generator) -> Floats:
    columns = rng.integers(x.shape[1], size=x.shape)
    return np.take_along_axis(x, columns, axis=1)


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
    """Summarise returns ``(run, episode, task)`` episode by episode, with the gain over the
    first.
    """
    rows = []
    for k in range(returns.shape[1]):
        gain = returns[:, k] - returns[:, 0]
        gained = (
            {"gain": float(gain.mean()), "gain_ci95": bootstrap_interval(gain, np.mean)}
            if k
            else {}
        )
        rows.append({"episode": k, **summarise(returns[:, k]), **gained})
    return rows


def adaptation_score(agent: Floats, oracle: Floats, blind: Floats) -> dict[str, Any]:
    """Adaptation score (agent − blind) / (oracle − blind) of the means, its interval over resampled
    tasks.
    """
    rows = np.stack([x.mean(0) for x in (agent, oracle, blind)])
    rng = np.random.Generator(np.random.PCG64(0))

    def ratio(r: Floats) -> float:
        a, o, b = r.mean(1)
        return float((a - b) / (o - b)) if abs(o - b) > 1e-9 else float("nan")

    draws = [
        ratio(rows[:, rng.integers(rows.shape[1], size=rows.shape[1])]) for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"score": ratio(rows), "score_ci95": [float(low), float(high)]}
