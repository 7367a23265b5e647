"""An agent that adapts by policy gradient: what MAML, ProMP, Reptile and fine-tuning have in
common.

Its context is its own weights, a copy for each task. It needs nothing but the observations, actions
and rewards of the task's own rollouts, and its exploration noise: without noise a policy gradient
has nothing to learn from.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context, Dimensions
from metarobot.learning.meta_gradient import (
    Derivative,
    InnerTrajectory,
    adapt_weights,
    call_with_weights,
    exact_derivatives,
    per_task_gradients,
    vmap_tasks,
)
from metarobot.learning.networks import RunningNorm, log_prob, mlp
from metarobot.learning.outer_critic import OuterCritic
from metarobot.learning.returns import gae, linear_baseline
from metarobot.types import Percept, Rollout, Trials

MAX_IMPORTANCE_RATIO = 10.0
"""Largest importance ratio."""


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Settings of the policy and of its adaptation."""

    worlds: int = 400
    """Worlds an iteration: tasks times rollouts."""
    rollouts: int = 20
    """Rollouts a task and episode: what one adaptation learns from."""
    episodes: int = 2
    """Episodes a trial; the agent adapts after each but the last, which shows what it gained."""
    width: int = 64
    """Width of the policy's two hidden layers."""
    std: float = 1.0
    """Standard deviation of the first policy's actions."""
    inner_lr: float = 0.5
    """Size of an inner step; where rates are learned, of the first."""
    inner_steps: int = 1
    """Gradient steps on each episode's rollouts."""
    learn_rates: bool = True
    """Learn the inner rate of every weight (Meta-SGD, Li et al. 2017)."""
    gamma: float = 0.95
    """Discount a control step, of the inner objective."""
    outer_gamma: float = 0.97
    """Discount a control step, of the outer objective."""
    lam: float = 0.95
    """GAE's trace decay, of both objectives."""


class Policy(nn.Module):
    """A Gaussian over actions: the mean from a perceptron, one deviation an action."""

    def __init__(self, actor: nn.Module, log_std: Tensor) -> None:
        super().__init__()
        self.actor = actor
        self.log_std = nn.Parameter(log_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean ``(..., act)`` and log-deviation ``(act,)`` for normalised observations
        ``(..., obs)``.
        """
        return self.actor(x), self.log_std


class InnerBatch(NamedTuple):
    """What the rollouts of one episode teach; ``(task, step, ...)``, a task's rollouts joined in
    one row.
    """

    x: Tensor
    action: Tensor
    advantage: Tensor
    weight: Tensor
    """Share of the step in its task's mean; zero where there is nothing to learn."""
    mean: Tensor
    """Mean action of the policy that acted."""
    log_std: Tensor
    """Its log-deviation, ``(task, 1, act)``."""
    old: Tensor
    """Its log-probability of the action."""

    def thin(self, n: int) -> InnerBatch:
        """Keep one step in ``n``."""
        kept = InnerBatch(*(x if x.shape[1] == 1 else x[:, ::n] for x in self))
        return kept._replace(weight=_shares(kept.weight))


class GradientAgent(nn.Module):
    """A Gaussian policy, and an inner rate for each of its weights."""

    privileged = False
    explores = True
    context_names = ("weights",)

    def __init__(self, shapes: Dimensions, config: InnerConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.norm = RunningNorm(shapes.obs)
        actor = mlp(shapes.obs, (config.width, config.width), shapes.act, gain=0.01)
        self.policy = Policy(actor, torch.full((shapes.act,), math.log(config.std)))
        rates = torch.full((self.size,), config.inner_lr)
        self.rates = nn.Parameter(rates, requires_grad=config.learn_rates)

    @property
    def size(self) -> int:
        """Number of the policy's weights, P."""
        return sum(p.numel() for p in self.policy.parameters())

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return a copy of the initial weights for each task, ``(task, P)``."""
        weights, _ = self.split(self.vector())
        return (weights.expand(worlds, -1),)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act with each task's own weights; the worlds of a task stand together."""
        (weights,) = context
        mean, log_std = self.distribution(
            weights, self.norm(percept.obs).view(len(weights), -1, percept.obs.shape[-1])
        )
        if noise is not None:
            mean = mean + log_std.exp() * noise.view(mean.shape)
        return mean.flatten(0, 1), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Take gradient steps on the task's own rollouts.

        A task with nothing to learn from keeps its weights, and so does one whose step diverges.
        """
        (weights,), rates = context, self.rates.detach()
        batch = self.batch(weights, episode)
        for _ in range(self.config.inner_steps):
            stepped = weights + rates * per_task_gradients(self.surrogate, weights, batch)
            weights = torch.where(stepped.isfinite().all(1, keepdim=True), stepped, weights)
        return (weights,)

    def distribution(self, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return every task's mean ``(task, step, act)`` and log-deviation ``(task, 1, act)``."""
        mean, log_std = vmap_tasks(partial(call_with_weights, self.policy))(weights, x)
        return mean, log_std[:, None]

    @torch.no_grad()
    def batch(self, weights: Tensor, episode: Rollout) -> InnerBatch:
        """Prepare rollouts for the policy gradient; ``weights`` ``(task, P)`` are those that
        acted.
        """
        tasks, sound = len(weights), valid_mask(episode)
        obs, action = (torch.where(sound[..., None], v, 0.0) for v in (episode.obs, episode.action))
        x, action = self.norm(obs), by_task(action, tasks)
        advantage = by_task(self._advantage(x, episode, sound, tasks), tasks)
        x, weight = by_task(x, tasks), _shares(by_task(sound, tasks).to(x.dtype))
        mean, log_std = self.distribution(weights, x)
        return InnerBatch(
            x,
            action,
            _standard(advantage, weight),
            weight,
            mean,
            log_std,
            log_prob(mean, log_std, action),
        )

    def _advantage(self, x: Tensor, episode: Rollout, sound: Tensor, tasks: int) -> Tensor:
        """Estimate advantages ``(time, world)`` against a baseline fitted to each task.

        What counts is the return up to the horizon, which is why a time limit ends it as a fall
        does.
        """
        c, reward = self.config, torch.where(sound, episode.reward, 0.0)
        ended, nothing = episode.terminated | episode.truncated, torch.zeros_like(reward)
        to_go = gae(reward, nothing, nothing, ended, ended, c.gamma, 1.0)
        value = linear_baseline(x, to_go, sound, tasks)
        following = torch.cat([value[1:], nothing[:1]])
        return gae(reward, value, following, ended, ended, c.gamma, c.lam)

    def surrogate(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return E[π(a|s) / π_old(a|s) A] of one task.

        As an inner objective its Hessian holds the score-function terms that E[log π(a|s) A] drops:
        the low variance curvature of Rothfuss et al. (2019), eq. 8.
        """
        gains: Tensor = batch.weight * self.ratio(weights, batch) * batch.advantage
        return gains.sum()

    def ratio(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return π(a|s) / π_old(a|s) of one task, ``(step,)``.

        Truncated from above (Ionides 2008), so that several steps on the same rollouts cannot run
        away.
        """
        mean, log_std = call_with_weights(self.policy, weights, batch.x)
        log_ratio: Tensor = log_prob(mean, log_std, batch.action) - batch.old
        return log_ratio.clamp(max=math.log(MAX_IMPORTANCE_RATIO)).exp()

    def divergence(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return E[KL(π_old || π)] of one task."""
        mean, log_std = call_with_weights(self.policy, weights, batch.x)
        # KL = Σ log(σ / σ₀) + (σ₀² + (μ₀ − μ)²) / 2σ² − ½
        spread = (2 * batch.log_std).exp() + (batch.mean - mean).square()
        kl = (log_std - batch.log_std + 0.5 * spread * (-2 * log_std).exp() - 0.5).sum(-1)
        divergences: Tensor = batch.weight * kl
        return divergences.sum()

    def vector(self) -> Tensor:
        """Return the meta-parameters as one vector: rates, then initial weights, ``(2 P,)``; a
        detached copy.
        """
        return nn.utils.parameters_to_vector(self.parameters()).detach()

    def assign(self, vector: Tensor) -> None:
        """Set the meta-parameters."""
        nn.utils.vector_to_parameters(vector, self.parameters())

    def split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return initial weights ``(P,)`` and rates ``(P,)`` of meta-parameters, or of a direction
        among them.
        """
        return vector[self.size :], vector[: self.size]

    def adapt_meta_parameters(
        self, vector: Tensor, support: list[InnerBatch], derivative: Derivative = exact_derivatives
    ) -> InnerTrajectory:
        """Adapt to the support of every task from meta-parameters ``(2 P,)``."""
        weights, rates = self.split(vector)
        steps = [b for b in support for _ in range(self.config.inner_steps)]
        return adapt_weights(
            self.surrogate, weights.expand(len(support[0].x), -1), rates, steps, derivative
        )

    def meta_vjp(self, path: InnerTrajectory, slope: Tensor) -> Tensor:
        """Carry slopes ``(task, P)`` at the end of a path back to the meta-parameters, ``(2 P,)``:
        the tasks' mean.
        """
        by_weights, by_rates = (x.mean(0) for x in path.vjp(slope))
        return torch.cat([by_rates * self.rates.requires_grad, by_weights])

    def meta_jvp(self, path: InnerTrajectory, direction: Tensor) -> Tensor:
        """Say how the end of a path moves, ``(task, P)``, along a direction among the
        meta-parameters.
        """
        weights, rates = self.split(direction)
        return path.jvp(weights.expand_as(path.weights), rates)

    def batches(self, trials: Trials) -> list[InnerBatch]:
        """Prepare each episode of trials, with the weights that acted in it."""
        context = self.begin(trials.episodes[0].reward.shape[1] // self.config.rollouts)
        prepared = []
        for i, episode in enumerate(trials.episodes):
            if i:
                context = self.adapt(context, trials.episodes[i - 1])
            prepared.append(self.batch(context[0], episode))
        return prepared

    def with_critic_advantages(
        self, query: InnerBatch, trials: Trials, critic: OuterCritic, seed: int
    ) -> tuple[InnerBatch, Tensor]:
        """Give the query the advantages of a critic, which learns from it; return the variance it
        explained too.
        """
        episode, task = trials.episodes[-1], trials.task
        sound = valid_mask(episode)
        if int(sound.sum()) < 2:  # nothing to compare
            return query, torch.zeros(())
        x = self.norm(torch.where(sound[..., None], episode.obs, 0.0))
        final = self.norm(episode.final_obs.nan_to_num())
        advantage, target, explained = critic.advantage(x, final, task, episode, sound)
        critic.fit(x, task, target, sound, seed)
        return query._replace(
            advantage=_standard(by_task(advantage, len(query.x)), query.weight)
        ), explained

    def learn_norm(self, trials: Trials) -> None:
        """Take trials into the normaliser: after an update, so that the update sees what the policy
        saw.
        """
        for episode in trials.episodes:
            if (seen := episode.obs[valid_mask(episode)]).numel():
                self.norm.update(seen)

    def fine_tuned_from(self, policy: Any, rate: float) -> GradientAgent:
        """Return an agent that adapts as this one does, with one rate, from the weights of another
        policy.

        ``policy`` has ``actor`` and ``log_std``, and ``norm`` unless it shares this agent's, as a
        ``PPOAgent`` does: transfer learning by fine-tuning.
        """
        other = copy.copy(self)
        other._modules, other._parameters = {}, {}
        other.norm = getattr(policy, "norm", self.norm)
        other.policy = Policy(policy.actor, policy.log_std.detach().clone())
        other.rates = nn.Parameter(torch.full((other.size,), rate), requires_grad=False)
        return other


def valid_mask(episode: Rollout) -> Tensor:
    """Mark the steps to learn from, ``(time, world)``: those lived in a rollout whose numbers are
    all finite.
    """
    numbers = torch.cat([episode.obs, episode.action, episode.reward[..., None]], -1)
    return episode.valid & (numbers.isfinite().all(-1) | ~episode.valid).all(0)


def ignored_rollouts(trials: Trials) -> float:
    """Count the rollouts that hold numbers that are not finite, which nothing is learned from."""
    return float(sum(int((e.valid & ~valid_mask(e)).any(0).sum()) for e in trials.episodes))


def by_task(x: Tensor, tasks: int) -> Tensor:
    """Regroup ``(time, task * rollout, ...)`` as ``(task, rollout * time, ...)``."""
    return x.reshape(len(x), tasks, x.shape[1] // tasks, *x.shape[2:]).movedim(0, 2).flatten(1, 2)


def _shares(weight: Tensor) -> Tensor:
    return weight / weight.sum(1, keepdim=True).clamp_min(1e-12)


def _standard(advantage: Tensor, weight: Tensor) -> Tensor:
    """Give each task's advantages mean 0 and deviation 1; zeros where they do not differ."""
    centred = advantage - (weight * advantage).sum(1, keepdim=True)
    deviation = (weight * centred.square()).sum(1, keepdim=True).sqrt()
    return torch.where((weight > 0) & (deviation > 1e-6), centred / deviation.clamp_min(1e-6), 0.0)


def _check(config: InnerConfig) -> None:
    if config.worlds % config.rollouts:
        raise MetarobotError(
            f"worlds = {config.worlds} is not a multiple of rollouts = {config.rollouts}"
        )
    if config.episodes < 2:
        raise MetarobotError(
            f"episodes must be at least 2, one to adapt to and one to show it, not {config.episodes}"
        )
    for name, low, high in (
        ("inner_lr", 1e-6, 100.0),
        ("inner_steps", 1, 100),
        ("std", 1e-3, 10.0),
    ):
        if not low <= getattr(config, name) <= high:
            raise MetarobotError(
                f"{name} must be between {low:g} and {high:g}, not {getattr(config, name):g}"
            )
    for name in ("gamma", "outer_gamma", "lam"):
        if not 0 <= getattr(config, name) <= 1:
            raise MetarobotError(f"{name} must be between 0 and 1, not {getattr(config, name):g}")
