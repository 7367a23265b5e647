"""Few-shot imitation: MAML on demonstrations (Finn et al. 2017, "One-shot visual imitation via
meta-learning").

An inner step lowers the squared error against the support's demonstrations; the outer step lowers
the error that is left on other demonstrations of the same task. With no inner steps this is
behaviour cloning.

The policy acts on what it sees and on a guess of where it will all end: after Finn et al., whose
network also tells the gripper's pose at a demonstration's end. It learns to act from the true end,
and apart from that to tell the end from what a demonstration begins with; without that a policy
only learns to go on as the hand already goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.gradient_agent import by_task
from metarobot.learning.meta_gradient import (
    adapt_weights,
    call_with_weights,
    exact_derivatives,
    first_order_derivatives,
    per_task_gradients,
    set_ascent_gradients,
    vmap_tasks,
)
from metarobot.learning.networks import RunningNorm, mlp
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.types import Percept, Rollout, Trials


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """Settings of few-shot imitation."""

    worlds: int = 32
    """Demonstrations an iteration to adapt to: tasks times rollouts."""
    rollouts: int = 4
    """Demonstrations of a task to adapt to: shots times the variants of its episodes."""
    episodes: int = 2
    """Support and query."""
    width: int = 128
    """Width of the two hidden layers."""
    inner_lr: float = 0.05
    """Size of every weight's first inner steps; the rates are learned (Meta-SGD, Li et al.
    2017)."""
    guess: int = 2
    """How many of the first observations, as they are at the end, the policy guesses and acts
    on."""
    guess_lr: float = 0.04
    """The same as ``inner_lr``, of the weights that guess."""
    early: int = 10
    """From so many of its first steps a demonstration's end is to be told."""
    inner_steps: int = 5
    """Gradient steps on the support; 0 clones behaviour and adapts to nothing."""
    first_order: bool = False
    """Leave second derivatives out."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    grad_norm: float = 1.0
    """Bound on the outer gradient's length."""


class Support(NamedTuple):
    """Demonstrations, ``(task, step, ...)``; steps that weigh nothing are padding, or too late to
    guess.
    """

    x: Tensor
    action: Tensor
    end: Tensor
    weight: Tensor
    early: Tensor


class Actor(nn.Module):
    """A perceptron over what is seen and how it ends, which a linear layer guesses."""

    def __init__(self, seen: int, guess: int, width: int, act: int) -> None:
        super().__init__()
        self.guess = nn.Linear(seen, guess) if guess else None
        self.act = mlp(seen + guess, (width, width), act, gain=0.01)
        if self.guess is not None:
            nn.init.zeros_(self.guess.weight)
            nn.init.zeros_(self.guess.bias)

    def forward(self, x: Tensor, end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return actions ``(..., act)`` for observations, acting on ``end`` if it is given; and the
        guess.
        """
        guess = x[..., :0] if self.guess is None else self.guess(x)
        return self.act(torch.cat([x, guess if end is None else end], -1)), guess


class ImitationAgent(nn.Module):
    """A policy without noise, and an inner rate for each of its weights; its context is its own
    weights.
    """

    privileged = explores = False
    imitates = True
    context_names = ("weights",)

    def __init__(self, shapes: Dimensions, config: ImitationConfig) -> None:
        super().__init__()
        if config.worlds % config.rollouts:
            raise MetarobotError(
                f"worlds = {config.worlds} is not a multiple of rollouts = {config.rollouts}"
            )
        if config.guess > shapes.obs:
            raise MetarobotError(
                f"guess must be at most {shapes.obs}, what there is to see, not {config.guess}"
            )
        self.config = config
        self.norm = RunningNorm(shapes.obs)
        self.actor = Actor(shapes.obs, config.guess, config.width, shapes.act)
        rates = {
            k: config.guess_lr if k.startswith("guess") else config.inner_lr
            for k, _ in self.actor.named_parameters()
        }
        first = torch.cat(
            [torch.full((p.numel(),), rates[k]) for k, p in self.actor.named_parameters()]
        )
        self.rates = nn.Parameter(first, requires_grad=config.inner_steps > 0)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return a copy of the initial weights for each task, ``(task, P)``."""
        return (nn.utils.parameters_to_vector(self.actor.parameters()).detach().expand(worlds, -1),)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act with each task's own weights; the worlds of a task stand together."""
        (weights,) = context
        x = self.norm(percept.obs).view(len(weights), -1, percept.obs.shape[-1])
        action: Tensor = vmap_tasks(lambda w, seen: call_with_weights(self.actor, w, seen)[0])(
            weights, x
        )
        return action.flatten(0, 1), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Take gradient steps towards what the episode shows: demonstrations of the task."""
        (weights,) = context
        support = self.support(episode, len(weights))
        for _ in range(self.config.inner_steps):
            weights = weights + self.rates.detach() * per_task_gradients(
                self.likeness, weights, support
            )
        return (weights,)

    def support(self, episode: Rollout, tasks: int) -> Support:
        """Prepare demonstrations for gradient steps."""
        seen, lived = self.norm(episode.obs), episode.valid.to(episode.obs.dtype)
        last = (episode.valid.sum(0) - 1).clamp_min(0)
        end = seen[last, torch.arange(len(last), device=last.device), : self.config.guess].expand(
            len(seen), -1, -1
        )
        early = lived * (torch.arange(len(seen), device=last.device) < self.config.early)[:, None]
        x, action, end, weight, early = (
            by_task(v, tasks) for v in (seen, episode.action, end, lived, early)
        )
        weight, early = (v / v.sum(1, keepdim=True).clamp_min(1.0) for v in (weight, early))
        return Support(x, action, end, weight, early)

    def likeness(self, weights: Tensor, data: Support) -> Tensor:
        """Return minus the mean squared error of one task's actions, and of the guess."""
        action, guess = call_with_weights(self.actor, weights, data.x, data.end)
        error, missed = (
            (action - data.action).square().mean(-1),
            (guess - data.end).square().sum(-1),
        )
        likeness: Tensor = -(data.weight * error).sum() - (data.early * missed).sum()
        return likeness


class Imitator:
    """Trains an ``ImitationAgent`` on trials of demonstrations: support, then query."""

    def __init__(self, config: ImitationConfig, shapes: Dimensions) -> None:
        self.config = config
        self.agent = ImitationAgent(shapes, config)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), lr=config.lr, eps=1e-5)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take one outer step."""
        c, agent = self.config, self.agent
        shown, asked = trials.episodes
        agent.norm.update(shown.obs[shown.valid])
        tasks = shown.valid.shape[1] // c.rollouts
        support, query = agent.support(shown, tasks), agent.support(asked, tasks)
        (start,), rates = agent.begin(tasks), agent.rates.detach()
        derivative = first_order_derivatives if c.first_order else exact_derivatives
        path = adapt_weights(agent.likeness, start, rates, [support] * c.inner_steps, derivative)
        by_weights, by_rates = (
            x.mean(0) for x in path.vjp(per_task_gradients(agent.likeness, path.weights, query))
        )
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.lr_end))
        set_ascent_gradients(agent.actor, by_weights)
        agent.rates.grad = -by_rates if agent.rates.requires_grad else None
        norm = nn.utils.clip_grad_norm_(agent.parameters(), c.grad_norm)
        if norm.isfinite():
            self.optimiser.step()
        with torch.no_grad():
            before, after = (
                -vmap_tasks(agent.likeness)(w, query).mean() for w in (start, path.weights)
            )
        return {
            "train/loss_before": float(before),
            "train/loss": float(after),
            "train/grad_norm": float(norm),
        }

    def state(self) -> dict[str, Tensor]:
        """Return weights, the normaliser and the optimiser."""
        return flatten_state(self.optimiser, agent=self.agent)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        restore_state(state, self.optimiser, agent=self.agent)


imitation = AgentKind(
    name="imitation",
    doc="MAML on demonstrations: a few of them, and it does as they show.",
    config=ImitationConfig,
    imitates=True,
    build=Imitator,
)
