"""The value function of an outer objective, which sees the task and is used in training only.

Adaptation may use nothing but a baseline fitted to one task's own rollouts. The outer objective may
use what the simulator knows, and a trained critic halves the variance of the advantages from which
a gait is learned. Nothing of it reaches the agent that adapts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarobot.learning.agent_interface import Dimensions
from metarobot.learning.networks import RunningNorm, mlp
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.ppo_core import set_gradients
from metarobot.learning.returns import discounted, explained_variance, gae
from metarobot.types import Rollout

FIT_EPOCHS = 4
"""Passes over an episode's steps each time the critic is fitted."""
FIT_MINIBATCHES = 16
"""Gradient steps a pass."""
MAX_GRADIENT_NORM = 1.0
"""Bound on the norm of the critic's gradient."""


class OuterCritic:
    """A value function of observation and task, trained on the rollouts of adapted policies."""

    def __init__(
        self, dims: Dimensions, gamma: float, lam: float, width: int = 128, lr: float = 1e-3
    ) -> None:
        self.gamma = gamma
        self.lam = lam
        self.net = mlp(dims.obs + dims.task, (width, width), 1)
        self.return_norm = RunningNorm(1)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=lr, eps=1e-5)

    def advantage(
        self, x: Tensor, final_x: Tensor, task: Tensor, episode: Rollout, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Estimate advantages and value targets; update the return normaliser.

        A time limit bootstraps from the value of the final observation.

        Args:
            x: Normalised observations, ``(time, world, obs)``.
            final_x: Normalised final observations, ``(world, obs)``.
            task: Encoding of each world's task, ``(world, parameter)``.
            episode: The rollouts.
            valid: Mask of the steps to use, ``(time, world)``.

        Returns:
            Advantages and value targets, ``(time, world)`` each, in units of the return's standard
            deviation, and the fraction of the targets' variance that the values explain, ``()``.
        """
        # R_t = γ R_{t−1} + r_t, whose standard deviation scales the rewards
        reward = torch.where(valid, episode.reward, 0.0)
        past_return = discounted(reward, self.gamma)
        self.return_norm.to(x.device).update(past_return[valid][:, None])

        self.net.to(x.device)
        with torch.no_grad():
            value = self.net(_critic_input(x, task))[..., 0]
            final_value = self.net(_critic_input(final_x, task))[..., 0]
        # V(s_{t+1}), where gae leaves it out after a failure but not after a time limit
        ended = episode.terminated | episode.truncated
        next_value = torch.where(ended, final_value, torch.cat([value[1:], final_value[None]]))

        reward = reward * self.return_norm.scale
        advantage = gae(
            reward,
            value,
            next_value,
            episode.terminated,
            episode.truncated,
            self.gamma,
            self.lam,
        )
        target = advantage + value
        return advantage, target, explained_variance(value[valid], target[valid])

    def fit(self, x: Tensor, task: Tensor, target: Tensor, valid: Tensor, seed: int) -> None:
        """Regress the value targets ``(time, world)`` on the valid steps; the seed orders them."""
        inputs = _critic_input(x, task)[valid]
        targets = target[valid]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(FIT_EPOCHS):
            order = torch.randperm(len(inputs), generator=generator).to(x.device)
            for rows in order.chunk(FIT_MINIBATCHES):
                loss = (self.net(inputs[rows])[:, 0] - targets[rows]).square().mean()
                set_gradients(loss, loss, self.net.parameters())
                nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRADIENT_NORM)
                self.optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """Return weights, return normaliser and optimiser, under names that begin "critic."."""
        # "spread" is the return normaliser's name in checkpoints
        state = flatten_state(self.optimiser, net=self.net, spread=self.return_norm)
        return {f"critic.{name}": tensor for name, tensor in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned; other learners' tensors may be among it."""
        own = {
            name.removeprefix("critic."): tensor
            for name, tensor in state.items()
            if name.startswith("critic.")
        }
        restore_state(own, self.optimiser, net=self.net, spread=self.return_norm)


def _critic_input(x: Tensor, task: Tensor) -> Tensor:
    """Join observations ``(..., world, obs)`` and the task encodings ``(world, parameter)``."""
    return torch.cat([x, task.expand(*x.shape[:-1], -1)], -1)
