"""Stable-Baselines3's policies at work: under the three verbs of an agent."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from metarobot.agents.sb3.trial_envs import flat_percept
from metarobot.env.sb3_vec_env import BaseFeaturesExtractor
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context, Dimensions
from metarobot.learning.networks import RunningNorm
from metarobot.types import Percept, Rollout

try:
    from sb3_contrib import RecurrentPPO as RecurrentPPO
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
except ImportError as e:
    raise MetarobotError("sb3-contrib is not installed: pip install 'metarobot[sb3]'") from e


class Normalised(BaseFeaturesExtractor):  # type: ignore[misc,unused-ignore]
    """The observation, its first features normalised by what has been seen of them."""

    def __init__(self, observation_space: Box, norm: RunningNorm) -> None:
        super().__init__(observation_space, features_dim=observation_space.shape[0])
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., obs)``."""
        n = len(self.norm.mean)
        return torch.cat([self.norm(x[..., :n]), x[..., n:]], -1)


class TrialPolicy(RecurrentActorCriticPolicy):  # type: ignore[misc,unused-ignore]
    """SB3's LSTM policy, faster: it walks through a sequence in Python only where memories are
    cleared within it.
    """

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: Any, episode_starts: Tensor, lstm: nn.LSTM
    ) -> Any:
        starts = episode_starts.reshape(lstm_states[0].shape[1], -1).clone()
        kept = 1.0 - starts[:, :1]
        starts[:, 0] = 0.0
        states = tuple(kept * x for x in lstm_states)
        return RecurrentActorCriticPolicy._process_sequence(
            features, states, starts.flatten(), lstm
        )


class SB3PPOAgent(nn.Module):
    """SB3's policy at work; its actions within ±1 are ``reach`` times smaller than the robot's
    around ``middle``.
    """

    privileged = explores = False
    middle: Tensor
    reach: Tensor

    def __init__(self, policy: Any, shapes: Dimensions) -> None:
        super().__init__()
        self.policy = policy
        low, high = (
            torch.tensor(x or [y] * shapes.act) for x, y in ((shapes.low, -1.0), (shapes.high, 1.0))
        )
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return nothing: there is no memory."""
        return ()

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act as SB3's ``predict`` does, ``deterministic`` without noise."""
        mean, std, context = self.chosen(percept, context)
        action = self.bounded(mean if noise is None else torch.addcmul(mean, noise, std))
        return torch.addcmul(self.middle, self.reach, action), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Do nothing."""
        return context

    def chosen(self, percept: Percept, context: Context) -> tuple[Tensor, Tensor, Context]:
        """Return mean and deviation of the action before it is bounded, ``(world, act)``, and the
        context after.
        """
        gaussian = self.policy.get_distribution(percept.obs).distribution
        return gaussian.mean, gaussian.stddev, context

    def bounded(self, action: Tensor) -> Tensor:
        """Bring an action within ±1."""
        return action.clamp(-1.0, 1.0)


class SB3RecurrentAgent(SB3PPOAgent):
    """The same with an LSTM, whose state is the context and lives through the trial."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty memory a world."""
        empty = self.middle.new_zeros(worlds, self.policy.lstm_actor.hidden_size)
        return empty, empty

    def chosen(self, percept: Percept, context: Context) -> tuple[Tensor, Tensor, Context]:
        """Step the memory."""
        states = tuple(x[None] for x in context)
        distribution, (h, c) = self.policy.get_distribution(
            flat_percept(percept), states, percept.first
        )
        return distribution.distribution.mean, distribution.distribution.stddev, (h[0], c[0])


class SB3SACAgent(SB3PPOAgent):
    """The actor of SAC, whose actions are squashed."""

    def chosen(self, percept: Percept, context: Context) -> tuple[Tensor, Tensor, Context]:
        """Ask the actor."""
        mean, log_std, _ = self.policy.actor.get_action_dist_params(percept.obs)
        return mean, log_std.exp(), context

    def bounded(self, action: Tensor) -> Tensor:
        """Squash an action."""
        return torch.tanh(action)
