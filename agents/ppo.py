"""PPO without a memory (Schulman et al. 2017): the blind policy, and the oracle.

The blind policy is domain randomisation: one behaviour for all tasks. The oracle is the upper
reference: the same networks, with the encoded task beside the observation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from metarobot.learning.agent_interface import (
    AgentKind,
    Context,
    Dimensions,
    FeedforwardParts,
    FeedforwardPolicy,
)
from metarobot.learning.networks import RunningNorm, copy_into_larger, linears, mlp
from metarobot.learning.ppo_core import (
    ActorCritic,
    DistilledPPOSettings,
    PolicyEvaluation,
    PPOBatch,
    PPOLearner,
)
from metarobot.types import Percept, TrialSequence


@dataclass(frozen=True, kw_only=True)
class PPOConfig(DistilledPPOSettings):
    """Settings of PPO without a memory."""

    sees_task: bool = False
    """Show the policy the task: the oracle."""


@dataclass(frozen=True, kw_only=True)
class OracleConfig(PPOConfig):
    """Settings of PPO that observes the task."""

    sees_task: bool = True


class PPOAgent(ActorCritic):
    """Two perceptrons over the normalised observation and, for an oracle, the task.

    The context is empty, or the task for an oracle.
    """

    def __init__(self, shapes: Dimensions, config: PPOConfig) -> None:
        super().__init__()
        self.privileged = config.sees_task
        inputs = shapes.obs + (shapes.task if config.sees_task else 0)
        hidden = (config.width, config.width)
        self.norm = RunningNorm(shapes.obs)
        self.actor = mlp(inputs, hidden, shapes.act, gain=0.01)
        self.critic = mlp(inputs + shapes.critic, hidden, 1)
        self.log_std = nn.Parameter(torch.full((shapes.act,), math.log(config.std)))

    def features(self, obs: Tensor, task: Tensor | None) -> Tensor:
        """Return the network's input ``(..., input)``: normalised observation, then the task.

        ``obs`` is ``(..., obs)``; ``task`` ``(world, parameter)`` is for oracles alone.
        """
        x: Tensor = self.norm(obs)
        if task is None:
            return x
        return torch.cat([x, task.expand(*x.shape[:-1], -1)], -1)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty context, or the task for an oracle."""
        return (task,) if self.privileged and task is not None else ()

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act on the current observation."""
        task = context[0] if context else None
        mean = self.actor(self.features(percept.obs, task))
        return self.with_noise(mean, noise), context

    def forward(self, x: Tensor, task: Tensor, critic_obs: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return mean action, value and None for inputs ``x``; see ``ActorCritic.forward``.

        The critic observes what the actor does and ``critic_obs``; ``task`` is not used.
        """
        value = self.critic(torch.cat([x, critic_obs], -1))
        return self.actor(x), value[..., 0], None

    def feedforward_parts(self) -> FeedforwardParts:
        """Return actor, normaliser and log-deviation; see ``FeedforwardPolicy``."""
        return FeedforwardParts(self.actor, self.norm, self.log_std)


class PPO(PPOLearner):
    """Train a ``PPOAgent`` by PPO; minibatches are drawn among single steps."""

    agent: PPOAgent
    config: PPOConfig

    def __init__(self, config: PPOConfig, shapes: Dimensions) -> None:
        super().__init__(config, PPOAgent(shapes, config), shapes)

    def _evaluate(self, seq: TrialSequence, task: Tensor) -> PolicyEvaluation:
        """Evaluate actor and critic at every step; each episode stands alone.

        A termination ends the trace; so does a time limit, which bootstraps from the value of the
        episode's final observation.
        """
        visible_task = task if self.agent.privileged else None
        x = self.agent.features(seq.percept.obs, visible_task)
        critic_obs = self.critic_norm(seq.critic_obs)
        mean, value, _ = self.agent(x, task, critic_obs)

        next_x = self.agent.features(seq.next_obs, visible_task)
        _, next_value, _ = self.agent(next_x, task, self.critic_norm(seq.next_critic_obs))
        return PolicyEvaluation(x, critic_obs, mean, value, next_value, trace_end=seq.truncated)

    def _make_batch(self, seq: TrialSequence, task: Tensor) -> PPOBatch:
        """Make the data of one update: each collected step becomes a sequence of length one."""
        *in_time, task = self._targets(seq, task)
        task_in_time = task.expand(*seq.valid.shape, -1)
        steps = [tensor[seq.valid][None] for tensor in in_time]
        return PPOBatch._make([*steps, task_in_time[seq.valid]])

    def warm_start(self, policy: FeedforwardPolicy) -> None:
        """Initialise so that the agent acts as ``policy``, with its own exploration noise.

        Inputs that ``policy`` does not have start with no influence on the action.
        """
        parts = policy.feedforward_parts()
        for mine, theirs in zip(linears(self.agent.actor), linears(parts.actor), strict=True):
            copy_into_larger(mine, theirs)
        self.agent.norm.copy_from(parts.norm)


ppo = AgentKind(
    name="ppo", doc="PPO without a memory: the blind policy.", config=PPOConfig, build=PPO
)
blind = replace(
    ppo, name="blind", doc="The same as ppo: one behaviour for all tasks, the lower reference."
)
oracle = replace(
    ppo, name="oracle", doc="PPO that is shown the task: the upper reference.", config=OracleConfig
)
