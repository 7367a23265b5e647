"""RL²: a recurrent policy whose memory does the learning (Duan et al. 2016; Wang et al. 2016).

The memory carries on over the ends of episodes inside a trial and is cleared between tasks. It is
trained by PPO over whole trials. In training only, a linear belief head makes the memory predict
the encoded task, and the critic observes the task: the simulator knows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from metarobot.config_bounds import NonNegative
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions, FeedforwardPolicy
from metarobot.learning.networks import RunningNorm, copy_into_larger, linears, mlp, orthogonal
from metarobot.learning.ppo_core import RecurrentActorCritic, TrialPPOLearner, TrialPPOSettings
from metarobot.learning.recurrent_memories import make_memory
from metarobot.types import Percept


@dataclass(frozen=True, kw_only=True)
class RL2Config(TrialPPOSettings):
    """Settings of RL²."""

    sees_task: bool = False
    """Show the memory the task: the oracle among agents with a memory."""
    belief: NonNegative = 0.5
    """Weight of the belief head's squared error; 0 removes its influence."""


@dataclass(frozen=True, kw_only=True)
class RL2OracleConfig(RL2Config):
    """Settings of RL² that observes the task."""

    sees_task: bool = True


class RL2Agent(RecurrentActorCritic):
    """A memory, then two hidden layers each for actor and critic over its output and the input.

    The context is the memory's state; before it, for an oracle, the task.
    """

    def __init__(self, shapes: Dimensions, config: RL2Config) -> None:
        super().__init__()
        self.privileged = config.sees_task
        width = config.width
        task_inputs = shapes.task if config.sees_task else 0
        inputs = Percept.size(shapes.obs, shapes.act) + task_inputs

        self.norm = RunningNorm(shapes.obs + 1)
        self.memory = make_memory(config.memory, inputs, width)
        # the first hidden layers of actor and critic, side by side: recall(memory) + sense(input)
        self.recall = orthogonal(nn.Linear(width, 2 * width), math.sqrt(2))
        self.sense = orthogonal(nn.Linear(inputs, 2 * width, bias=False), math.sqrt(2))
        self.actor = mlp(width, (width,), shapes.act, gain=0.01)
        self.critic = mlp(width + shapes.task + shapes.critic, (width,), 1)
        self.belief = orthogonal(nn.Linear(width, shapes.task), 0.1)
        self.log_std = nn.Parameter(torch.full((shapes.act,), math.log(config.std)))

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty memory for each world; before it, for an oracle, the task."""
        context: Context = self.memory.begin(worlds)
        return (task, *context) if self.privileged and task is not None else context

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Step the memory and act on its output and the percept."""
        if self.privileged:
            task, *state = context
            x = self.features(percept, task)
        else:
            state = list(context)
            x = self.features(percept)
        h, new_state = self.memory.step(x, tuple(state))

        # the first half of the shared hidden layer is the actor's
        half = self.recall.out_features // 2
        hidden = torch.tanh(self.recall(h)[:, :half] + self.sense(x)[:, :half])
        action = self.with_noise(self.actor(hidden), noise)
        return action, (task, *new_state) if self.privileged else new_state

    def forward(self, x: Tensor, task: Tensor, critic_obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run whole trials ``x`` ``(time, world, input)`` through memory, actor and critic.

        Args:
            x: What ``features`` returns for every step.
            task: Encoded task, ``(world, parameter)``, for the critic alone.
            critic_obs: What only the critic observes, ``(time, world, critic)``.

        Returns:
            Mean action ``(time, world, act)``, value ``(time, world)`` and predicted task
            ``(time, world, parameter)``.
        """
        h = self.memory.sequence(x)
        actor_hidden, critic_hidden = torch.tanh(self.recall(h) + self.sense(x)).chunk(2, -1)
        task_in_time = task.expand(len(x), -1, -1)
        value = self.critic(torch.cat([critic_hidden, task_in_time, critic_obs], -1))
        return self.actor(actor_hidden), value[..., 0], self.belief(h)


class RL2(TrialPPOLearner):
    """Train an ``RL2Agent`` by PPO over trials; a second loss makes the memory infer the task."""

    AUXILIARY_STATISTICS = ("belief_loss",)
    agent: RL2Agent
    config: RL2Config

    def __init__(self, config: RL2Config, shapes: Dimensions) -> None:
        super().__init__(config, RL2Agent(shapes, config), shapes)

    def _auxiliary_loss(
        self, inferred: Tensor, task: Tensor, weight: Tensor, draws: None, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the squared error of the predicted task, averaged over parameters and steps."""
        error = (inferred - task).square().mean(-1)
        loss = (weight * error).sum()
        return self.config.belief * loss, loss[None]

    def warm_start(self, policy: FeedforwardPolicy) -> None:
        """Initialise so that the agent acts as ``policy``, with its own exploration noise.

        The memory starts with no influence on the action, and gains it by training.
        """
        parts = policy.feedforward_parts()
        first, *rest = linears(parts.actor)
        agent = self.agent
        width = first.out_features

        copy_into_larger(agent.sense, first)
        with torch.no_grad():
            agent.recall.weight[:width] = 0.0
            agent.recall.bias[:width] = first.bias
        for mine, theirs in zip(linears(agent.actor), rest, strict=True):
            copy_into_larger(mine, theirs)
        agent.norm.copy_from(parts.norm)


rl2 = AgentKind(
    name="rl2",
    doc="A recurrent policy that adapts while it acts; PPO over trials.",
    config=RL2Config,
    build=RL2,
)
rl2_oracle = replace(
    rl2,
    name="rl2-oracle",
    doc="RL2 that is shown the task: the upper reference with a memory.",
    config=RL2OracleConfig,
)
