"""Beliefs about the task: how they tighten with experience, and whether they are calibrated.

Only agents that infer a posterior (``InfersPosterior``) have beliefs. A belief is a Gaussian over
the task's encoding, in which the training range of every parameter is [−1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch

from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.learning.agent_interface import Context, InfersPosterior
from metarobot.tasks.space import Task, TaskSpace
from metarobot.types import Floats

LEVELS = (0.5, 0.8, 0.95)
"""Central intervals of a belief whose coverage is counted."""


class BeliefSample(NamedTuple):
    """The beliefs of one agent about all tasks, after some episodes."""

    latent_deviation: Floats
    """Standard deviation of the posterior, averaged over its latent dimensions, ``(task,)``."""
    error: Floats
    """Mean of the belief minus the task's encoding, ``(task, parameter)``."""
    deviation: Floats
    """Standard deviation of the belief, ``(task, parameter)``."""


class BeliefRecorder:
    """Records what agents believe of their tasks after 0 … K−1 episodes of experience."""

    def __init__(self, space: TaskSpace, tasks: Sequence[Task]) -> None:
        self._encoded_tasks = space.encode(tasks)
        # The encoding leaves nuisance parameters out.
        self._parameters = [param.name for param in space.params if not param.nuisance]
        self._samples: list[list[BeliefSample]] = []
        """Agent, one a training seed -> episode -> beliefs."""

    def watch(self, agent: object) -> Callable[[Context], Context]:
        """Return a function to call with the agent's contexts after every episode.

        It returns the context unchanged. Agents without a posterior are not recorded.
        """
        if not isinstance(agent, InfersPosterior):
            return lambda context: context
        samples: list[BeliefSample] = []
        self._samples.append(samples)

        @torch.no_grad()
        def record(context: Context) -> Context:
            _, latent_variance = agent.posterior(context)
            mean, variance = agent.belief(context)
            error = mean.cpu() - self._encoded_tasks
            samples.append(
                BeliefSample(
                    latent_deviation=latent_variance.sqrt().mean(1).double().cpu().numpy(),
                    error=error.double().numpy(),
                    deviation=variance.sqrt().double().cpu().numpy(),
                )
            )
            return context

        record(agent.begin(len(self._encoded_tasks)))  # type: ignore[attr-defined]
        return record

    def report(self) -> dict[str, Any]:
        """Summarise the beliefs episode by episode; empty if no agent had any."""
        if not self._samples:
            return {}
        episodes = len(self._samples[0])
        rows = []
        for k in range(episodes):
            of_episode = [samples[k] for samples in self._samples]
            rows.append({"episode": k, **_summarise_beliefs(of_episode)})
        return {"parameters": self._parameters, "episodes": rows}


def _summarise_beliefs(samples: Sequence[BeliefSample]) -> dict[str, Any]:
    """Summarise the beliefs after one number of episodes, one sample a training seed."""
    latent_deviation = np.stack([sample.latent_deviation for sample in samples])
    error = np.stack([sample.error for sample in samples])
    deviation = np.stack([sample.deviation for sample in samples])

    squared_error = error**2
    parameters = range(error.shape[-1])
    row: dict[str, Any] = {
        "deviation": float(latent_deviation.mean()),
        "deviation_ci95": bootstrap_interval(latent_deviation, np.mean),
        "rmse": [_root_mean(squared_error[..., i]) for i in parameters],
        "rmse_ci95": [bootstrap_interval(squared_error[..., i], _root_mean) for i in parameters],
        "coverage": {},
        "coverage_all": {},
        "coverage_all_ci95": {},
    }
    for level in LEVELS:
        # The central interval of a Gaussian: |error| <= z σ with z = Φ⁻¹((1 + level) / 2)
        z = NormalDist().inv_cdf(0.5 + level / 2)
        inside = np.abs(error) <= deviation * z
        key = f"{level:g}"
        row["coverage"][key] = inside.mean(axis=(0, 1)).tolist()
        row["coverage_all"][key] = float(inside.mean())
        # The parameters of one task are resampled together.
        row["coverage_all_ci95"][key] = bootstrap_interval(inside.mean(axis=-1), np.mean)
    return row


def _root_mean(squared: Floats) -> float:
    return float(np.sqrt(squared.mean()))
