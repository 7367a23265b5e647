"""Resets in the step that ends an episode, as Gymnasium's and SB3's vector environments do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metarobot.env.base import Env, StepResult
from metarobot.tasks.space import Task


class AutoresetEnv:
    """Wrap an environment so that worlds whose episode ends start the next one in the same step.

    It keeps nothing of its own: ``env`` may be used directly as well.

    Args:
        env: The environment, on any backend.
        next_task: (world, number of the episode about to start) -> its task; None keeps the tasks.
    """

    def __init__(self, env: Env, next_task: Callable[[int, int], Task] | None = None) -> None:
        self.env = env
        self.next_task = next_task

    def reset(self, seed: int | None = None) -> Tensor:
        """Start the next episode in every world; return the observations ``(world, obs)``."""
        return self.env.reset(seed)

    def step(self, action: Tensor, active: Tensor | None = None) -> StepResult:
        """Advance the worlds by one control step and restart those whose episode ended.

        In the result ``obs`` is the observation to act on next, after the resets, and
        ``final_obs`` the one that the step led to.
        """
        result = self.env.step(action, active)
        ended = result.terminated | result.truncated
        if not bool(ended.any()):
            return result

        # New tasks come before the restart, as starts are drawn on their models.
        ids = torch.nonzero(ended)[:, 0].tolist()
        if self.next_task is not None:
            tasks = [self.next_task(i, int(self.env.episodes[i]) + 1) for i in ids]
            self.env.set_tasks(tasks, ids)
        return result._replace(obs=self.env.restart_worlds(ids))
