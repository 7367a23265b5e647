"""PPO without a memory (Schulman et al. 2017): the blind policy, or the oracle when it is shown the
task.

The blind policy is domain randomisation: one behaviour for all tasks. The oracle is the upper
reference: the same network with the task's encoding beside the observation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.networks import (
    RunningNorm,
    copy_into_larger,
    distillation_loss,
    linears,
    log_prob,
    mlp,
)
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.ppo_core import GradientStep, run_epochs, set_gradients
from metarobot.learning.returns import discounted, explained_variance, gae
from metarobot.types import Percept, Rollout, Trials, TrialSequence, join_episodes


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Settings of PPO, those of RL² wherever they mean the same, so that all are compared
    fairly.
    """

    worlds: int = 64
    """Tasks an iteration, one a world."""
    episodes: int = 2
    """Episodes a task."""
    width: int = 128
    """Width of the two hidden layers of actor and critic."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    epochs: int = 8
    """Passes over an iteration's steps."""
    minibatches: int = 16
    """Gradient steps a pass."""
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
class PPOConfig(PPOSettings):
    """Settings of PPO without a memory."""

    sees_task: bool = False
    """Show the policy the task: the oracle."""


@dataclass(frozen=True, kw_only=True)
class OracleConfig(PPOConfig):
    """Settings of PPO that is shown the task."""

    sees_task: bool = True


class PPOAgent(nn.Module):
    """Two perceptrons over the normalised observation, and the task for an oracle."""

    explores = False

    def __init__(self, shapes: Dimensions, config: PPOConfig) -> None:
        super().__init__()
        self.privileged = config.sees_task
        inputs = shapes.obs + (shapes.task if config.sees_task else 0)
        self.norm = RunningNorm(shapes.obs)
        self.actor = mlp(inputs, (config.width, config.width), shapes.act, gain=0.01)
        self.critic = mlp(inputs + shapes.critic, (config.width, config.width), 1)
        self.log_std = nn.Parameter(torch.full((shapes.act,), math.log(config.std)))

    def features(self, obs: Tensor, task: Tensor | None) -> Tensor:
        """Join normalised observation ``(..., obs)`` and, for an oracle, the task ``(world,
        parameter)``.
        """
        x: Tensor = self.norm(obs)
        return x if task is None else torch.cat([x, task.expand(*x.shape[:-1], -1)], -1)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return nothing, or the task for an oracle."""
        return (task,) if self.privileged and task is not None else ()

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act on what is seen now."""
        mean = self.actor(self.features(percept.obs, context[0] if context else None))
        return (mean if noise is None else torch.addcmul(mean, noise, self.log_std.exp())), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Do nothing."""
        return context


class StepBatch(NamedTuple):
    """What an update learns from, ``(step, ...)``."""

    x: Tensor
    told: Tensor
    value: Tensor
    target: Tensor
    advantage: Tensor
    old: Tensor
    action: Tensor
    teacher_action: Tensor


class PPO:
    """Trains a ``PPOAgent``."""

    def __init__(self, config: PPOConfig, shapes: Dimensions) -> None:
        self.config = config
        self.agent = PPOAgent(shapes, config)
        self.return_norm = RunningNorm(1)
        self.critic_norm = RunningNorm(shapes.critic)
        self.optimiser = torch.optim.Adam(
            self.agent.parameters(), lr=config.lr, eps=1e-5, fused=True
        )

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Learn from one set of episodes."""
        c, seq = self.config, join_episodes(trials.episodes)
        self.agent.norm.update(seq.percept.obs[seq.valid])
        self.critic_norm.to(seq.reward.device).update(seq.critic_obs[seq.valid])
        self.return_norm.to(seq.reward.device).update(
            discounted(seq.reward, c.gamma)[seq.valid][:, None]
        )
        batch = StepBatch(
            *(
                v[seq.valid]
                for v in (*self._targets(seq, trials.task), seq.action, seq.teacher_action)
            )
        )
        teach = c.teach * (1.0 - progress)
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.lr_end))
        generator = torch.Generator().manual_seed(seed)

        def passes() -> Iterator[list[GradientStep]]:
            for _ in range(c.epochs):
                order = torch.randperm(len(batch.x), generator=generator).to(batch.x.device)
                yield [
                    partial(self._step, batch, rows, teach) for rows in order.chunk(c.minibatches)
                ]

        names = ("policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction")
        sums, steps = run_epochs(passes(), names.index("approx_kl"), c.kl_stop)
        metrics = {f"train/{k}": float(v) / steps for k, v in zip(names, sums, strict=True)}
        spread = float(self.agent.log_std.detach().exp().mean())
        extra = {
            "std": spread,
            "explained_variance": float(explained_variance(batch.value, batch.target)),
        }
        extra |= {
            "gradient_steps": float(steps),
            "learning_rate": float(self.optimiser.param_groups[0]["lr"]),
        }
        return metrics | {f"train/{k}": v for k, v in extra.items()}

    @torch.no_grad()
    def _targets(self, seq: TrialSequence, task: Tensor) -> tuple[Tensor, ...]:
        """Return inputs of actor and critic, values, targets, advantages, log-probabilities,
        ``(time, world, ...)``.

        Every episode stands alone: a fall ends it, a time limit bootstraps from its final
        observation.
        """
        shown = task if self.agent.privileged else None
        x = self.agent.features(seq.percept.obs, shown)
        told = torch.cat([x, self.critic_norm(seq.critic_obs)], -1)
        following = (
            self.agent.features(seq.next_obs, shown),
            self.critic_norm(seq.next_critic_obs),
        )
        value, next_value = (
            self.agent.critic(seen)[..., 0] for seen in (told, torch.cat(following, -1))
        )
        reward = seq.reward * self.return_norm.scale
        advantage = gae(
            reward,
            value,
            next_value,
            seq.terminated,
            seq.truncated,
            self.config.gamma,
            self.config.lam,
        )
        target, lived = advantage + value, advantage[seq.valid]
        advantage = (advantage - lived.mean()) / (lived.std() + 1e-8)
        return (
            x,
            told,
            value,
            target,
            advantage,
            log_prob(self.agent.actor(x), self.agent.log_std, seq.action),
        )

    def _step(self, batch: StepBatch, rows: Tensor, teach: float) -> Tensor:
        """Take one gradient step; return the losses, the KL divergence and the clipped fraction."""
        statistics = set_gradients(*self._loss(batch, teach, rows), self.agent.parameters())
        nn.utils.clip_grad_norm_(self.agent.parameters(), self.config.grad_norm)
        self.optimiser.step()
        return statistics

    def _loss(self, batch: StepBatch, teach: float, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of some steps, and its parts."""
        c, x, advantage, weight = self.config, batch.x[rows], batch.advantage[rows], 1.0 / len(rows)
        mean = self.agent.actor(x)
        log_ratio = log_prob(mean, self.agent.log_std, batch.action[rows]) - batch.old[rows]
        ratio = log_ratio.exp()
        # L = −E[min(r A, clip(r, 1 − ε, 1 + ε) A)]
        surrogate = torch.minimum(
            ratio * advantage, ratio.clamp(1 - c.clip, 1 + c.clip) * advantage
        )
        policy_loss = -weight * surrogate.sum()
        if teach > 0:
            policy_loss = (
                policy_loss
                + teach * weight * distillation_loss(mean, batch.teacher_action[rows]).sum()
            )
        value_loss = (
            weight * (self.agent.critic(batch.told[rows])[:, 0] - batch.target[rows]).square().sum()
        )
        with torch.no_grad():
            kl = weight * (ratio - 1 - log_ratio).sum()
            clipped = weight * ((ratio - 1).abs() > c.clip).sum()
        return policy_loss + c.value * value_loss, torch.stack(
            [policy_loss, value_loss, kl, clipped]
        )

    def warm_start(self, policy: PPOAgent) -> None:
        """Begin as another policy acts, with noise of its own; what it was not shown has no
        influence yet.
        """
        for mine, theirs in zip(linears(self.agent.actor), linears(policy.actor), strict=True):
            copy_into_larger(mine, theirs)
        self.agent.norm.copy_from(policy.norm)

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers and optimiser."""
        return flatten_state(
            self.optimiser, agent=self.agent, spread=self.return_norm, critic_norm=self.critic_norm
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        restore_state(
            state,
            self.optimiser,
            agent=self.agent,
            spread=self.return_norm,
            critic_norm=self.critic_norm,
        )


ppo = AgentKind(
    name="ppo", doc="PPO without a memory: the blind policy.", config=PPOConfig, build=PPO
)
blind = replace(
    ppo, name="blind", doc="The same as ppo: one behaviour for all tasks, the lower reference."
)
oracle = replace(
    ppo, name="oracle", doc="PPO that is shown the task: the upper reference.", config=OracleConfig
)
