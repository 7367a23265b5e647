"""The agent that adapts by policy gradient: shared by MAML, ProMP, Reptile and fine-tuning.

Its context is a copy of the policy's weights for each task. Adaptation uses nothing but the
observations, actions and rewards of the task's own rollouts, and it needs exploration noise:
without noise a policy gradient has nothing to learn from.

The meta-parameters are the initial weights θ and the inner rates α, one for each weight, ``P`` each
(Meta-SGD, Li et al. 2017).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from metarobot.config_bounds import Bounds, Count, Fraction, LayerSize, check_bounds
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context, Dimensions
from metarobot.learning.meta_gradient import (
    DerivativeRule,
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
"""Bound at which importance ratios are truncated."""
MIN_ADVANTAGE_STD = 1e-6
"""Standard deviation of a task's advantages below which they are taken to be all the same."""


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Settings of the policy and of its inner-loop adaptation."""

    worlds: Count = 400
    """Worlds an iteration: tasks times rollouts."""
    rollouts: Count = 20
    """Rollouts a task and episode: the data of one adaptation."""
    episodes: Annotated[int, Bounds(2, reason="one to adapt to and one to show it")] = 2
    """Episodes a trial; the agent adapts after each but the last, which measures the result."""
    width: LayerSize = 64
    """Width of the policy's two hidden layers."""
    std: Annotated[float, Bounds(1e-3, 10.0)] = 1.0
    """Initial standard deviation of the policy's actions."""
    inner_lr: Annotated[float, Bounds(1e-6, 100.0)] = 0.5
    """Size of an inner step; where rates are learned, their initial value."""
    inner_steps: Annotated[int, Bounds(1, 100)] = 1
    """Gradient steps on each episode's rollouts."""
    learn_rates: bool = True
    """Learn the inner rate of every weight (Meta-SGD, Li et al. 2017)."""
    gamma: Fraction = 0.95
    """Discount a control step, of the inner objective."""
    outer_gamma: Fraction = 0.97
    """Discount a control step, of the outer objective."""
    lam: Fraction = 0.95
    """GAE's trace decay λ, of both objectives."""


class GaussianPolicy(nn.Module):
    """A Gaussian over actions: the mean by a network, one deviation for each action."""

    def __init__(self, actor: nn.Module, log_std: Tensor) -> None:
        super().__init__()
        self.actor = actor
        self.log_std = nn.Parameter(log_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean ``(..., act)`` and log-deviation ``(act,)`` for ``x`` ``(..., obs)``.

        Observations are normalised.
        """
        return self.actor(x), self.log_std


class InnerBatch(NamedTuple):
    """The data of one episode's policy gradient, ``(task, step, ...)``.

    The rollouts of a task are joined into one row. "Old" is the policy that acted.
    """

    x: Tensor
    """Normalised observations, ``(task, step, obs)``."""
    action: Tensor
    """Actions, ``(task, step, act)``."""
    advantage: Tensor
    """Advantages, standardised within each task, ``(task, step)``."""
    step_weight: Tensor
    """Weight of a step in its task's mean, ``(task, step)``; zero where it is not valid."""
    old_mean: Tensor
    """Mean action of the old policy, ``(task, step, act)``."""
    old_log_std: Tensor
    """Log-deviation of the old policy, ``(task, 1, act)``."""
    old_log_prob: Tensor
    """Log-probability of the action under the old policy, ``(task, step)``."""

    def thin(self, n: int) -> InnerBatch:
        """Keep one step in ``n``."""
        thinned = []
        for values in self:
            # old_log_std is the same at all steps and has a single one
            has_step_axis = values.shape[1] > 1
            thinned.append(values[:, ::n] if has_step_axis else values)
        batch = InnerBatch(*thinned)
        return batch._replace(step_weight=_normalised_weights(batch.step_weight))


class GradientAgent(nn.Module):
    """A Gaussian policy that adapts by gradient steps, and an inner rate for each weight."""

    privileged = False
    explores = True
    context_names = ("weights",)

    def __init__(self, dims: Dimensions, config: InnerConfig) -> None:
        """Initialise weights from torch's global generator.

        Raises:
            MetarobotError: A setting out of bounds, or ``worlds`` not a multiple of ``rollouts``.
        """
        super().__init__()
        check_bounds(config)
        if config.worlds % config.rollouts:
            raise MetarobotError(
                f"worlds = {config.worlds} is not a multiple of rollouts = {config.rollouts}"
            )
        self.config = config
        self.norm = RunningNorm(dims.obs)
        actor = mlp(dims.obs, (config.width, config.width), dims.act, gain=0.01)
        self.policy = GaussianPolicy(actor, torch.full((dims.act,), math.log(config.std)))
        rates = torch.full((self.weight_count,), config.inner_lr)
        self.rates = nn.Parameter(rates, requires_grad=config.learn_rates)

    @property
    def weight_count(self) -> int:
        """Number P of the policy's weights."""
        return sum(p.numel() for p in self.policy.parameters())

    # The agent's three verbs

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return a copy of the initial weights for each task, ``(task, P)``."""
        weights, _ = self.split_meta_parameters(self.meta_parameters())
        return (weights.expand(worlds, -1),)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act with each task's own weights; the worlds of a task are consecutive."""
        (weights,) = context
        tasks = len(weights)
        x = self.norm(percept.obs).view(tasks, -1, percept.obs.shape[-1])

        mean, log_std = self.distribution(weights, x)
        if noise is not None:
            mean = mean + log_std.exp() * noise.view(mean.shape)
        return mean.flatten(0, 1), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Take gradient steps on the task's own rollouts.

        A task without valid rollouts keeps its weights, and so does one whose step diverges.
        """
        (weights,) = context
        rates = self.rates.detach()
        batch = self.batch(weights, episode)
        for _ in range(self.config.inner_steps):
            # θ' = θ + α ∇J(θ)
            adapted = weights + rates * per_task_gradients(self.surrogate, weights, batch)
            is_finite = adapted.isfinite().all(1, keepdim=True)
            weights = torch.where(is_finite, adapted, weights)
        return (weights,)

    # The inner objective

    def distribution(self, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return every task's mean ``(task, step, act)`` and log-deviation ``(task, 1, act)``."""
        mean, log_std = vmap_tasks(partial(call_with_weights, self.policy))(weights, x)
        return mean, log_std[:, None]

    @torch.no_grad()
    def batch(self, weights: Tensor, episode: Rollout) -> InnerBatch:
        """Prepare rollouts for the policy gradient.

        Args:
            weights: The weights that acted, ``(task, P)``.
            episode: Rollouts, the worlds of a task consecutive.
        """
        tasks = len(weights)
        valid = valid_mask(episode)
        x = self.norm(torch.where(valid[..., None], episode.obs, 0.0))
        advantage = by_task(self._baseline_advantage(x, episode, valid, tasks), tasks)

        x = by_task(x, tasks)
        action = by_task(torch.where(valid[..., None], episode.action, 0.0), tasks)
        step_weight = _normalised_weights(by_task(valid, tasks).to(x.dtype))
        mean, log_std = self.distribution(weights, x)
        return InnerBatch(
            x=x,
            action=action,
            advantage=_standardise(advantage, step_weight),
            step_weight=step_weight,
            old_mean=mean,
            old_log_std=log_std,
            old_log_prob=log_prob(mean, log_std, action),
        )

    def _baseline_advantage(self, x: Tensor, episode: Rollout, valid: Tensor, tasks: int) -> Tensor:
        """Estimate advantages ``(time, world)`` against a linear baseline fitted to each task.

        The objective is the return up to the horizon, so a time limit ends it as a failure does.
        """
        c = self.config
        reward = torch.where(valid, episode.reward, 0.0)
        ended = episode.terminated | episode.truncated
        zeros = torch.zeros_like(reward)

        # with values of zero and λ = 1, GAE is the discounted return to go
        return_to_go = gae(reward, zeros, zeros, ended, ended, c.gamma, 1.0)
        value = linear_baseline(x, return_to_go, valid, tasks)
        next_value = torch.cat([value[1:], zeros[:1]])
        return gae(reward, value, next_value, ended, ended, c.gamma, c.lam)

    def surrogate(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return the surrogate objective E[π(a|s) / π_old(a|s) A] of one task.

        As an inner objective its Hessian holds the score-function terms that E[log π(a|s) A] drops:
        the low variance curvature of Rothfuss et al. (2019), eq. 8.
        """
        gains: Tensor = batch.step_weight * self.ratio(weights, batch) * batch.advantage
        return gains.sum()

    def ratio(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return the importance ratios π(a|s) / π_old(a|s) of one task, ``(step,)``.

        Truncated from above (Ionides 2008), so that several steps on the same rollouts cannot run
        away.
        """
        mean, log_std = call_with_weights(self.policy, weights, batch.x)
        log_ratio: Tensor = log_prob(mean, log_std, batch.action) - batch.old_log_prob
        return log_ratio.clamp(max=math.log(MAX_IMPORTANCE_RATIO)).exp()

    def divergence(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return the mean KL divergence E[KL(π_old ‖ π)] of one task."""
        mean, log_std = call_with_weights(self.policy, weights, batch.x)
        # KL = Σ log(σ / σ_old) + (σ²_old + (μ_old − μ)²) / 2σ² − ½
        second_moment = (2 * batch.old_log_std).exp() + (batch.old_mean - mean).square()
        log_std_ratio = log_std - batch.old_log_std
        kl = (log_std_ratio + 0.5 * second_moment * (-2 * log_std).exp() - 0.5).sum(-1)
        divergences: Tensor = batch.step_weight * kl
        return divergences.sum()

    # Meta-parameters, and the derivative of adapted weights by them

    def meta_parameters(self) -> Tensor:
        """Return rates and initial weights as one vector ``(2 P,)``, rates first; a copy."""
        return nn.utils.parameters_to_vector(self.parameters()).detach()

    def set_meta_parameters(self, vector: Tensor) -> None:
        """Set rates and initial weights from a vector ``(2 P,)``."""
        nn.utils.vector_to_parameters(vector, self.parameters())

    def split_meta_parameters(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Split a vector ``(2 P,)`` into initial weights ``(P,)`` and rates ``(P,)``.

        The vector holds meta-parameters, their gradient, or a direction among them.
        """
        return vector[self.weight_count :], vector[: self.weight_count]

    def adapt_meta_parameters(
        self,
        vector: Tensor,
        support: list[InnerBatch],
        derivatives: DerivativeRule = exact_derivatives,
    ) -> InnerTrajectory:
        """Adapt to the support episodes of every task, from meta-parameters ``(2 P,)``."""
        weights, rates = self.split_meta_parameters(vector)
        tasks = len(support[0].x)
        data = [batch for batch in support for _ in range(self.config.inner_steps)]
        return adapt_weights(self.surrogate, weights.expand(tasks, -1), rates, data, derivatives)

    def meta_vjp(self, trajectory: InnerTrajectory, gradients: Tensor) -> Tensor:
        """Return the gradient ``(2 P,)`` by the meta-parameters, averaged over tasks.

        Args:
            trajectory: The inner steps, from the meta-parameters.
            gradients: Every task's gradient of the outer objective at its adapted weights,
                ``(task, P)``.
        """
        weights_gradient, rates_gradient = trajectory.vjp(gradients)
        return torch.cat(
            [rates_gradient.mean(0) * self.rates.requires_grad, weights_gradient.mean(0)]
        )

    def meta_jvp(self, trajectory: InnerTrajectory, direction: Tensor) -> Tensor:
        """Return the derivative ``(task, P)`` of adapted weights along a direction ``(2 P,)``."""
        weights, rates = self.split_meta_parameters(direction)
        return trajectory.jvp(weights.expand_as(trajectory.weights), rates)

    # What the learners of such an agent share

    def batches(self, trials: Trials) -> list[InnerBatch]:
        """Prepare each episode of trials, with the weights that acted in it."""
        context = self.begin(trials.episodes[0].reward.shape[1] // self.config.rollouts)
        batches = []
        for i, episode in enumerate(trials.episodes):
            if i > 0:
                context = self.adapt(context, trials.episodes[i - 1])
            batches.append(self.batch(context[0], episode))
        return batches

    def with_critic_advantages(
        self, query: InnerBatch, trials: Trials, critic: OuterCritic, seed: int
    ) -> tuple[InnerBatch, Tensor]:
        """Replace the query's advantages by those of a critic, and fit the critic afterwards.

        Returns:
            The query, and the fraction of the targets' variance that the critic explained, ``()``.
            With fewer than two valid steps the query is returned as it is, and nothing is fitted.
        """
        episode = trials.episodes[-1]
        valid = valid_mask(episode)
        if int(valid.sum()) < 2:
            return query, torch.zeros(())

        x = self.norm(torch.where(valid[..., None], episode.obs, 0.0))
        final_x = self.norm(episode.final_obs.nan_to_num())
        advantage, target, explained = critic.advantage(x, final_x, trials.task, episode, valid)
        critic.fit(x, trials.task, target, valid, seed)

        advantage = by_task(advantage, len(query.x))
        return query._replace(advantage=_standardise(advantage, query.step_weight)), explained

    def update_norm(self, trials: Trials) -> None:
        """Update the observation normaliser.

        After an update of the weights, so that the update uses the inputs that the policy had.
        """
        for episode in trials.episodes:
            obs = episode.obs[valid_mask(episode)]
            if obs.numel() > 0:
                self.norm.update(obs)

    def fine_tuned_from(self, policy: Any, rate: float) -> GradientAgent:
        """Return an agent that adapts as this one does, from the weights of another policy.

        This is transfer learning by fine-tuning, with one step size ``rate`` for all weights.

        Args:
            policy: A ``GaussianPolicy`` that shares this agent's normaliser, or a
                ``FeedforwardPolicy`` with a normaliser of its own.
            rate: Size of an inner step.
        """
        # a copy of the module that shares nothing that is set below
        agent = copy.copy(self)
        agent._modules = {}
        agent._parameters = {}
        if isinstance(policy, GaussianPolicy):
            actor, norm, log_std = policy.actor, self.norm, policy.log_std
        else:
            actor, norm, log_std = policy.feedforward_parts()
        agent.norm = norm
        agent.policy = GaussianPolicy(actor, log_std.detach().clone())
        agent.rates = nn.Parameter(torch.full((agent.weight_count,), rate), requires_grad=False)
        return agent


def valid_mask(episode: Rollout) -> Tensor:
    """Return the mask ``(time, world)`` of the steps to learn from.

    These are the collected steps of those rollouts in which all numbers are finite.
    """
    numbers = torch.cat([episode.obs, episode.action, episode.reward[..., None]], -1)
    step_is_finite = numbers.isfinite().all(-1) | ~episode.valid
    return episode.valid & step_is_finite.all(0)


def ignored_rollouts(trials: Trials) -> float:
    """Count the rollouts that are ignored because they hold numbers that are not finite."""
    count = 0
    for episode in trials.episodes:
        ignored = episode.valid & ~valid_mask(episode)
        count += int(ignored.any(0).sum())
    return float(count)


def by_task(x: Tensor, tasks: int) -> Tensor:
    """Regroup ``(time, task * rollout, ...)`` as ``(task, rollout * time, ...)``."""
    rollouts = x.shape[1] // tasks
    return x.reshape(len(x), tasks, rollouts, *x.shape[2:]).movedim(0, 2).flatten(1, 2)


def _normalised_weights(step_weight: Tensor) -> Tensor:
    """Scale weights ``(task, step)`` to a sum of 1 in each task, or 0 where all are zero."""
    return step_weight / step_weight.sum(1, keepdim=True).clamp_min(1e-12)


def _standardise(advantage: Tensor, step_weight: Tensor) -> Tensor:
    """Give each task's advantages mean 0 and deviation 1; zeros where they do not differ."""
    centred = advantage - (step_weight * advantage).sum(1, keepdim=True)
    std = (step_weight * centred.square()).sum(1, keepdim=True).sqrt()
    differs = (step_weight > 0) & (std > MIN_ADVANTAGE_STD)
    return torch.where(differs, centred / std.clamp_min(MIN_ADVANTAGE_STD), 0.0)
