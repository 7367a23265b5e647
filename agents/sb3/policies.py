"""Stable-Baselines3's policies as agents: what acts when they are evaluated, filmed or exported."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from metarobot.env.sb3_vec_env import BaseFeaturesExtractor
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context, Dimensions
from metarobot.learning.networks import RunningNorm, normalise_leading
from metarobot.types import Percept, Rollout

try:
    from sb3_contrib import RecurrentPPO as RecurrentPPO
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
except ImportError as e:
    raise MetarobotError("sb3-contrib is not installed: pip install 'metarobot[sb3]'") from e


class NormalisedFeatures(BaseFeaturesExtractor):  # type: ignore[misc,unused-ignore]
    """SB3's feature extractor that normalises the first features of the observation."""

    def __init__(self, observation_space: Box, norm: RunningNorm) -> None:
        super().__init__(observation_space, features_dim=observation_space.shape[0])
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., obs)``."""
        return normalise_leading(self.norm, x)


class TrialPolicy(RecurrentActorCriticPolicy):  # type: ignore[misc,unused-ignore]
    """SB3's LSTM policy, faster where memories are cleared only at the start of a sequence.

    SB3 steps through a sequence in Python if a memory is cleared anywhere in it. Here clearing at
    its first step is applied to the initial state, so only clearing inside costs that loop.
    """

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: Any, episode_starts: Tensor, lstm: nn.LSTM
    ) -> Any:
        sequences = lstm_states[0].shape[1]
        starts = episode_starts.reshape(sequences, -1).clone()
        keep = 1.0 - starts[:, :1]
        starts[:, 0] = 0.0
        states = tuple(keep * state for state in lstm_states)
        return RecurrentActorCriticPolicy._process_sequence(
            features, states, starts.flatten(), lstm
        )


class SB3PPOAgent(nn.Module):
    """SB3's PPO policy at work.

    SB3's actions are within ±1; the robot's are ``middle + reach * action``.
    """

    privileged = False
    explores = False
    middle: Tensor
    reach: Tensor

    def __init__(self, policy: Any, shapes: Dimensions) -> None:
        super().__init__()
        self.policy = policy
        low = torch.tensor(shapes.low or [-1.0] * shapes.act)
        high = torch.tensor(shapes.high or [1.0] * shapes.act)
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty context: there is no memory."""
        return ()

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act as SB3's ``predict`` does; without noise as ``deterministic=True``."""
        mean, std, context = self.action_distribution(percept, context)
        action = self.bounded(mean if noise is None else torch.addcmul(mean, noise, std))
        return torch.addcmul(self.middle, self.reach, action), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Return the context unchanged."""
        return context

    def action_distribution(
        self, percept: Percept, context: Context
    ) -> tuple[Tensor, Tensor, Context]:
        """Return mean and standard deviation ``(world, act)`` before bounding, and the context."""
        gaussian = self.policy.get_distribution(percept.obs).distribution
        return gaussian.mean, gaussian.stddev, context

    def bounded(self, action: Tensor) -> Tensor:
        """Bring an action within ±1."""
        return action.clamp(-1.0, 1.0)


class SB3RecurrentAgent(SB3PPOAgent):
    """RecurrentPPO's policy at work; the context is the actor's LSTM state, kept for the trial."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return a zero LSTM state for each world."""
        zeros = self.middle.new_zeros(worlds, self.policy.lstm_actor.hidden_size)
        return zeros, zeros

    def action_distribution(
        self, percept: Percept, context: Context
    ) -> tuple[Tensor, Tensor, Context]:
        """Step the LSTM; return mean and standard deviation, and the new LSTM state."""
        states = tuple(state[None] for state in context)
        distribution, (h, c) = self.policy.get_distribution(percept.flat(), states, percept.first)
        gaussian = distribution.distribution
        return gaussian.mean, gaussian.stddev, (h[0], c[0])


class SB3SACAgent(SB3PPOAgent):
    """SAC's actor at work; its actions are bounded by tanh."""

    def action_distribution(
        self, percept: Percept, context: Context
    ) -> tuple[Tensor, Tensor, Context]:
        """Return the actor's mean and standard deviation, and the context."""
        mean, log_std, _ = self.policy.actor.get_action_dist_params(percept.obs)
        return mean, log_std.exp(), context

    def bounded(self, action: Tensor) -> Tensor:
        """Bring an action within ±1."""
        return torch.tanh(action)
