"""The critic of an outer objective: shown the task, in training only; nothing of it reaches the
agent that adapts.

A baseline fitted to one task's rollouts is all that adaptation may use. The outer objective may use
what the simulator knows, and a trained critic halves the variance that a gait is learned against.
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


class OuterCritic:
    """A value function of observation and task, trained on the rollouts of adapted policies."""

    def __init__(
        self, shapes: Dimensions, gamma: float, lam: float, width: int = 128, lr: float = 1e-3
    ) -> None:
        self.gamma, self.lam = gamma, lam
        self.net = mlp(shapes.obs + shapes.task, (width, width), 1)
        self.return_norm = RunningNorm(1)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=lr, eps=1e-5)

    def advantage(
        self, x: Tensor, final: Tensor, task: Tensor, episode: Rollout, sound: Tensor
    ) -> tuple[Tensor, ...]:
        """Estimate advantages and value targets, ``(time, world)`` each, and the fraction of
        variance explained.

        ``x`` ``(time, world, obs)`` and the final observations ``(world, obs)`` are normalised,
        ``task`` is ``(world, parameter)``. A time limit bootstraps from the value of the final
        observation.
        """
        reward = torch.where(sound, episode.reward, 0.0)
        self.return_norm.to(x.device).update(discounted(reward, self.gamma)[sound][:, None])
        with torch.no_grad():
            value, last = (self.net.to(x.device)(_told(seen, task))[..., 0] for seen in (x, final))
        ended = episode.terminated | episode.truncated
        following = torch.where(ended, last, torch.cat([value[1:], last[None]]))
        reward = reward * self.return_norm.scale
        advantage = gae(
            reward, value, following, episode.terminated, episode.truncated, self.gamma, self.lam
        )
        target = advantage + value
        return advantage, target, explained_variance(value[sound], target[sound])

    def fit(self, x: Tensor, task: Tensor, target: Tensor, sound: Tensor, seed: int) -> None:
        """Learn the targets: 4 passes of 16 gradient steps."""
        features, wanted = _told(x, task)[sound], target[sound]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            for rows in torch.randperm(len(features), generator=generator).to(x.device).chunk(16):
                error = (self.net(features[rows])[:, 0] - wanted[rows]).square().mean()
                set_gradients(error, error, self.net.parameters())
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """Return weights, reward scale and optimiser."""
        return {
            f"critic.{k}": v
            for k, v in flatten_state(self.optimiser, net=self.net, spread=self.return_norm).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        mine = {k.removeprefix("critic."): v for k, v in state.items() if k.startswith("critic.")}
        restore_state(mine, self.optimiser, net=self.net, spread=self.return_norm)


def _told(x: Tensor, task: Tensor) -> Tensor:
    return torch.cat([x, task.expand(*x.shape[:-1], -1)], -1)
