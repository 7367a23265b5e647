"""RL²: a recurrent policy whose memory does the learning (Duan et al. 2016; Wang et al. 2016).

The memory survives the ends of episodes inside a trial and is cleared between tasks. PPO (Schulman
et al. 2017) over whole trials. In training only, a linear belief head makes the memory predict the
task it is in, and the critic is shown the task: the simulator knows it, so let it teach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from metarobot.agents.ppo import PPOAgent
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.memories import make_memory
from metarobot.learning.networks import (
    RunningNorm,
    copy_into_larger,
    distillation_loss,
    linears,
    log_prob,
    mlp,
    orthogonal,
)
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.ppo_core import GradientStep, run_epochs, set_gradients
from metarobot.learning.returns import discounted, explained_variance, gae
from metarobot.types import Percept, Rollout, Trials, TrialSequence, join_episodes


@dataclass(frozen=True, kw_only=True)
class TrialsConfig:
    """Settings of PPO over trials; the defaults reach the results in the README on 2 CPU cores."""

    worlds: int = 64
    """Trials an iteration, one a world."""
    episodes: int = 2
    """Episodes a trial."""
    memory: str = "linear"
    """linear (trains in parallel over time), gru or lstm."""
    width: int = 128
    """Width of the memory, and of the actor's and the critic's two hidden layers."""
    lr: float = 2e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    epochs: int = 5
    """Passes over an iteration's trials."""
    minibatches: int = 8
    """Gradient steps a pass, each on whole trials."""
    gamma: float = 0.97
    """Discount a control step."""
    lam: float = 0.95
    """GAE's trace decay."""
    clip: float = 0.2
    """PPO's bound on the probability ratio."""
    kl_stop: float = 0.045
    """Approximate KL divergence from the collecting policy at which an iteration's learning
    stops."""
    value: float = 0.5
    """Weight of the critic's squared error."""
    grad_norm: float = 1.0
    """Bound on the gradient's norm."""
    std: float = 0.6
    """Standard deviation of the first policy's actions."""
    teach: float = 0.0
    """Weight, at the start, of the squared error to what the family advises, or its expert does; it
    falls to none at the end (kickstarting, Schmitt et al. 2018)."""


@dataclass(frozen=True, kw_only=True)
class RL2Config(TrialsConfig):
    """Settings of RL²."""

    sees_task: bool = False
    """Show the memory the task: the oracle among agents with a memory."""
    belief: float = 0.5
    """Weight of the belief head's squared error; 0 removes its influence."""


@dataclass(frozen=True, kw_only=True)
class RL2OracleConfig(RL2Config):
    """Settings of RL² that is shown the task."""

    sees_task: bool = True


class RL2Agent(nn.Module):
    """Memory, then two hidden layers each for actor and critic over the memory's output and the
    input.
    """

    explores = False

    def __init__(self, shapes: Dimensions, config: RL2Config) -> None:
        super().__init__()
        self.privileged = config.sees_task
        inputs = shapes.obs + 1 + shapes.act + 2 + (shapes.task if config.sees_task else 0)
        self.norm = RunningNorm(shapes.obs + 1)
        self.memory = make_memory(config.memory, inputs, config.width)
        self.recall = orthogonal(nn.Linear(config.width, 2 * config.width), math.sqrt(2))
        self.sense = orthogonal(nn.Linear(inputs, 2 * config.width, bias=False), math.sqrt(2))
        self.actor = mlp(config.width, (config.width,), shapes.act, gain=0.01)
        self.critic = mlp(config.width + shapes.task + shapes.critic, (config.width,), 1)
        self.belief = orthogonal(nn.Linear(config.width, shapes.task), 0.1)
        self.log_std = nn.Parameter(torch.full((shapes.act,), math.log(config.std)))

    def features(self, percept: Percept, task: Tensor | None = None) -> Tensor:
        """Normalise observation and reward, and join the whole percept into one input ``(...,
        input)``.

        An oracle's holds the task ``(world, parameter)`` too.
        """
        seen = self.norm(torch.cat([percept.obs, percept.reward[..., None]], -1))
        x = torch.cat([seen, percept.action, percept.done[..., None], percept.first[..., None]], -1)
        return x if task is None else torch.cat([x, task.expand(*x.shape[:-1], -1)], -1)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty memory a world; before it, for an oracle, the task."""
        context: Context = self.memory.begin(worlds)
        return (task, *context) if self.privileged and task is not None else context

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Step the memory and act on what it holds."""
        told = context[:1] if self.privileged else ()
        x = self.features(percept, *told)
        h, remembered = self.memory.step(x, context[len(told) :])
        half = self.recall.out_features // 2
        hidden = torch.tanh(self.recall(h)[:, :half] + self.sense(x)[:, :half])
        mean = self.actor(hidden)
        return (mean if noise is None else torch.addcmul(mean, noise, self.log_std.exp())), (
            *told,
            *remembered,
        )

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Do nothing: the memory adapted while acting."""
        return context

    def forward(self, x: Tensor, task: Tensor, critic_obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run whole trials of inputs ``(time, world, input)``: mean action, value and belief at
        every step.

        ``task`` ``(world, parameter)`` and ``critic_obs`` ``(time, world, critic)`` reach the
        critic alone, which acting does without.
        """
        h = self.memory.sequence(x)
        actor, critic = torch.tanh(self.recall(h) + self.sense(x)).chunk(2, -1)
        told = torch.cat([critic, task.expand(len(x), -1, -1), critic_obs], -1)
        return self.actor(actor), self.critic(told)[..., 0], self.belief(h)


class TrialBatch(NamedTuple):
    """What an update learns from, ``(time, world, ...)``, but for the task, ``(world,
    parameter)``.
    """

    x: Tensor
    critic_obs: Tensor
    value: Tensor
    target: Tensor
    advantage: Tensor
    old: Tensor
    action: Tensor
    task: Tensor
    valid: Tensor
    teacher_action: Tensor


class TrialsPPO:
    """Trains an agent with a memory by PPO over trials, and what it knows of the task by a loss of
    its own.

    The agent, called with whole trials, gives mean actions, values, and what it knows at every
    step.
    """

    parts: ClassVar[tuple[str, ...]]
    """Names of the statistics of the loss about what is known."""

    def __init__(
        self, config: TrialsConfig, agent: Any, shapes: Dimensions, **others: nn.Module
    ) -> None:
        """``others`` are trained beside the agent."""
        if config.worlds % config.minibatches:
            raise MetarobotError(
                f"worlds = {config.worlds} is not a multiple of minibatches = {config.minibatches}"
            )
        self.config = config
        self.agent = agent
        self.return_norm = RunningNorm(1)
        self.critic_norm = RunningNorm(shapes.critic)
        self.modules = {
            "agent": agent,
            "spread": self.return_norm,
            "critic_norm": self.critic_norm,
            **others,
        }
        self.groups = [list(agent.parameters()), *(list(m.parameters()) for m in others.values())]
        self.optimiser = torch.optim.Adam(chain(*self.groups), lr=config.lr, eps=1e-5, fused=True)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Learn from one set of trials."""
        c, seq = self.config, join_episodes(trials.episodes)
        self._normalise(seq)
        batch = TrialBatch(
            *(
                *self._targets(seq, trials.task),
                seq.action,
                trials.task,
                seq.valid.float(),
                seq.teacher_action,
            )
        )
        teach = c.teach * (1.0 - progress)
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.lr_end))
        generator = torch.Generator().manual_seed(seed)

        def passes() -> Iterator[list[GradientStep]]:
            for _ in range(c.epochs):
                drawn = self._draw(seq, generator)
                order = torch.randperm(c.worlds, generator=generator).to(batch.x.device)
                yield [
                    partial(self._step, batch, drawn, rows, teach)
                    for rows in order.chunk(c.minibatches)
                ]

        names = ("policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", *self.parts)
        sums, steps = run_epochs(passes(), names.index("approx_kl"), c.kl_stop)
        metrics = {f"train/{k}": float(v) / steps for k, v in zip(names, sums, strict=True)}
        spread = float(self.agent.log_std.detach().exp().mean())
        explained = float(explained_variance(batch.value[seq.valid], batch.target[seq.valid]))
        extra = {"std": spread, "explained_variance": explained, "gradient_steps": float(steps)}
        extra["learning_rate"] = float(self.optimiser.param_groups[0]["lr"])
        return metrics | {f"train/{k}": v for k, v in extra.items()}

    def _normalise(self, seq: TrialSequence) -> None:
        seen = torch.cat([seq.percept.obs, seq.percept.reward[..., None]], -1)
        self.agent.norm.update(seen[seq.valid])
        self.critic_norm.to(seq.reward.device).update(seq.critic_obs[seq.valid])
        self.return_norm.to(seq.reward.device).update(
            discounted(seq.reward, self.config.gamma)[seq.valid][:, None]
        )

    @torch.no_grad()
    def _targets(self, seq: TrialSequence, task: Tensor) -> tuple[Tensor, ...]:
        """Return inputs, the critic's own, values, targets, advantages, log-probabilities, ``(time,
        world, ...)``.

        A fall ends the trace; a time limit inside the trial leads on into the next episode, which
        the memory will live through too; the trial's own end bootstraps from the value of the final
        observation.
        """
        x = self.agent.features(_with_final(seq), *([task] if self.agent.privileged else []))
        told = self.critic_norm(_appended(seq, seq.critic_obs, seq.next_critic_obs))
        mean, value, _ = self.agent(x, task, told)
        cut = torch.zeros_like(seq.valid)
        cut[last_step(seq), torch.arange(cut.shape[1], device=cut.device)] = True
        reward = seq.reward * self.return_norm.scale
        advantage = gae(
            reward, value[:-1], value[1:], seq.terminated, cut, self.config.gamma, self.config.lam
        )
        target = advantage + value[:-1]
        lived = advantage[seq.valid]
        advantage = (advantage - lived.mean()) / (lived.std() + 1e-8)
        return (
            x[:-1],
            told[:-1],
            value[:-1],
            target,
            advantage,
            log_prob(mean[:-1], self.agent.log_std, seq.action),
        )

    def _draw(self, seq: TrialSequence, generator: torch.Generator) -> Any:
        """Draw what the loss about what is known needs anew in every pass."""

    def _known(
        self, known: Any, batch: TrialBatch, drawn: Any, weight: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss about what is known of some trials' tasks, and its
        statistics.
        """
        raise NotImplementedError

    def _step(self, batch: TrialBatch, drawn: Any, rows: Tensor, teach: float) -> Tensor:
        """Take one gradient step on whole trials; return the losses, the KL divergence and the
        clipped fraction.
        """
        statistics = set_gradients(*self._loss(batch, drawn, teach, rows), chain(*self.groups))
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, self.config.grad_norm)
        self.optimiser.step()
        return statistics

    def _loss(
        self, batch: TrialBatch, drawn: Any, teach: float, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of some trials, and its parts."""
        c, lived, advantage = self.config, batch.valid[:, rows], batch.advantage[:, rows]
        weight = lived / lived.sum()
        mean, value, known = self.agent(
            batch.x[:, rows], batch.task[rows], batch.critic_obs[:, rows]
        )
        log_ratio = log_prob(mean, self.agent.log_std, batch.action[:, rows]) - batch.old[:, rows]
        ratio = log_ratio.exp()
        # L = −E[min(r A, clip(r, 1 − ε, 1 + ε) A)]
        surrogate = torch.minimum(
            ratio * advantage, ratio.clamp(1 - c.clip, 1 + c.clip) * advantage
        )
        policy_loss = -(weight * surrogate).sum()
        if teach > 0:
            policy_loss = (
                policy_loss
                + teach * (weight * distillation_loss(mean, batch.teacher_action[:, rows])).sum()
            )
        value_loss = (weight * (value - batch.target[:, rows]).square()).sum()
        known_loss, parts = self._known(known, batch, drawn, weight, rows)
        with torch.no_grad():
            kl = (weight * (ratio - 1 - log_ratio)).sum()
            clipped = (weight * ((ratio - 1).abs() > c.clip)).sum()
        statistics = torch.cat([torch.stack([policy_loss, value_loss, kl, clipped]), parts])
        return policy_loss + c.value * value_loss + known_loss, statistics

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers and optimiser."""
        return flatten_state(self.optimiser, **self.modules)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        restore_state(state, self.optimiser, **self.modules)


class RL2(TrialsPPO):
    """Trains an ``RL2Agent``."""

    parts = ("belief_loss",)

    def __init__(self, config: RL2Config, shapes: Dimensions) -> None:
        super().__init__(config, RL2Agent(shapes, config), shapes)
        self.belief = config.belief

    def _known(
        self, known: Tensor, batch: TrialBatch, drawn: None, weight: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the belief's squared error."""
        loss = (weight * (known - batch.task[rows]).square().mean(-1)).sum()
        return self.belief * loss, loss[None]

    def warm_start(self, policy: PPOAgent) -> None:
        """Begin as a policy without memory acts, with noise of its own; what the memory holds has
        no influence yet.
        """
        first, *rest = linears(policy.actor)
        agent, width = self.agent, len(first.bias)
        copy_into_larger(agent.sense, first)
        with torch.no_grad():
            agent.recall.weight[:width] = 0.0
            agent.recall.bias[:width] = first.bias
        for mine, theirs in zip(linears(agent.actor), rest, strict=True):
            copy_into_larger(mine, theirs)
        agent.norm.copy_from(policy.norm)


def last_step(seq: TrialSequence) -> Tensor:
    """Return the index of each trial's last step, ``(world,)``."""
    return seq.valid.sum(0) - 1


def _with_final(seq: TrialSequence) -> Percept:
    """Append to each trial the percept its last step led to, as if the episode went on: what the
    critic bootstraps.
    """
    p = seq.percept
    final = (
        seq.next_obs,
        seq.action,
        seq.reward,
        torch.zeros_like(p.done),
        torch.zeros_like(p.first),
    )
    return Percept(*(_appended(seq, told, after) for told, after in zip(p, final, strict=True)))


def _appended(seq: TrialSequence, told: Tensor, after: Tensor) -> Tensor:
    """Append to each trial of ``told`` ``(time, world, ...)`` what ``after`` holds at its last
    step.
    """
    ends, longer = last_step(seq), torch.cat([told, torch.zeros_like(told[:1])])
    rows = torch.arange(len(ends), device=ends.device)
    longer[ends + 1, rows] = after[ends, rows]
    return longer


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
