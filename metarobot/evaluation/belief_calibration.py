"""What agents with a posterior believe: how it tightens with experience, and whether it is
calibrated.

Such an agent has ``posterior(context)``, mean and variance of its latent task, and
``belief(context)``, those of the task's encoding, in which the training range of every parameter is
[−1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.learning.agent_interface import Context
from metarobot.tasks.space import Task, TaskSpace
from metarobot.types import Floats

LEVELS = (0.5, 0.8, 0.95)
"""Central intervals of a belief whose coverage is counted."""


class BeliefRecorder:
    """Writes down what agents, one a training seed, believe of their tasks after 0 … K−1 episodes
    of experience.
    """

    def __init__(self, space: TaskSpace, tasks: Sequence[Task]) -> None:
        self._truth = space.encode(tasks)
        self._names = [p.name for p in space.params if not p.nuisance]
        self._seeds: list[list[tuple[Floats, Floats, Floats]]] = []

    def watch(self, agent: Any) -> Callable[[Context], Context]:
        """Return what is to be called with the agent's context after every episode; it hands it on
        as it is.
        """
        if not hasattr(agent, "posterior"):
            return lambda context: context
        pages: list[tuple[Floats, Floats, Floats]] = []
        self._seeds.append(pages)

        @torch.no_grad()
        def note(context: Context) -> Context:
            mean, var = agent.belief(context)
            latent = agent.posterior(context)[1].sqrt().mean(1)
            pages.append(
                tuple(x.double().numpy() for x in (latent, mean - self._truth, var.sqrt()))
            )
            return context

        note(agent.begin(len(self._truth)))
        return note

    def report(self) -> dict[str, Any]:
        """Summarise what was written down, episode by episode; nothing if no agent had a belief."""
        if not self._seeds:
            return {}
        # (seed, episode, task, ...) each
        latent, error, spread = (
            np.stack([[page[i] for page in pages] for pages in self._seeds]) for i in range(3)
        )
        episodes = range(latent.shape[1])
        return {
            "parameters": self._names,
            "episodes": [
                {"episode": k, **_row(latent[:, k], error[:, k], spread[:, k])} for k in episodes
            ],
        }


def _row(latent: Floats, error: Floats, spread: Floats) -> dict[str, Any]:
    """Summarise one episode: latent deviations ``(seed, task)``, errors and deviations ``(seed,
    task, parameter)``.
    """
    inside = {
        level: np.abs(error) <= spread * NormalDist().inv_cdf(0.5 + level / 2) for level in LEVELS
    }
    squared = np.moveaxis(error**2, -1, 0)
    return {
        "deviation": float(latent.mean()),
        "deviation_ci95": bootstrap_interval(latent, np.mean),
        "rmse": [_root(x) for x in squared],
        "rmse_ci95": [bootstrap_interval(x, _root) for x in squared],
        "coverage": {f"{level:g}": inside[level].mean((0, 1)).tolist() for level in LEVELS},
        "coverage_all": {f"{level:g}": float(inside[level].mean()) for level in LEVELS},
        # parameters of one task are resampled together
        "coverage_all_ci95": {
            f"{level:g}": bootstrap_interval(inside[level].mean(-1), np.mean) for level in LEVELS
        },
    }


def _root(squared: Floats) -> float:
    return float(np.sqrt(squared.mean()))
