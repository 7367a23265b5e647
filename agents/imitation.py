"""Few-shot imitation: MAML on demonstrations.

After Finn et al. (2017), "One-shot visual imitation via meta-learning". An inner step lowers the
squared error against the support's demonstrations; the outer step lowers the error that is left on
other demonstrations of the same task, the query. With no inner steps this is behaviour cloning.

The policy acts on its observation and on a guess of the final observation, as Finn et al.'s network
also predicts the gripper's final pose. It learns to act from the true final observation, and
separately to guess that one from the first steps of a demonstration. Without this a policy only
learns to continue the motion that the gripper already makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobot.config_bounds import (
    Count,
    CountOrZero,
    Fraction,
    LayerSize,
    NonNegative,
    check_bounds,
)
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.maml_agent import by_task
from metarobot.learning.meta_gradient import (
    adapt_weights,
    call_with_weights,
    clip_and_step,
    exact_derivatives,
    first_order_derivatives,
    per_task_gradients,
    set_ascent_gradients,
    vmap_tasks,
)
from metarobot.learning.networks import RunningNorm, mlp
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.ppo_core import decayed, set_learning_rate
from metarobot.types import Percept, Rollout, Trials


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """Settings of few-shot imitation."""

    worlds: Count = 32
    """Demonstrations an iteration to adapt to: tasks times rollouts."""
    rollouts: Count = 4
    """Demonstrations of a task to adapt to: shots times the variants of its episodes."""
    episodes: Count = 2
    """Support and query."""
    width: LayerSize = 128
    """Width of the two hidden layers."""
    inner_lr: NonNegative = 0.05
    """Initial size of every weight's inner step; the rates are learned (Meta-SGD, Li et al.
    2017)."""
    guess: CountOrZero = 2
    """How many of the first observations, as they are at the end, the policy guesses and acts
    on."""
    guess_lr: NonNegative = 0.04
    """The same as ``inner_lr``, of the weights that guess."""
    early: Count = 10
    """The end is guessed from so many of a demonstration's first steps."""
    inner_steps: CountOrZero = 5
    """Gradient steps on the support; 0 clones behaviour and adapts to nothing."""
    first_order: bool = False
    """Leave second derivatives out."""
    lr: NonNegative = 1e-3
    """Adam's learning rate at the start."""
    lr_end: Fraction = 0.05
    """Fraction of it that is left at the end; linear between."""
    grad_norm: NonNegative = 1.0
    """Bound on the norm of the meta-gradient."""


class DemonstrationBatch(NamedTuple):
    """The steps of all demonstrations of each task, ``(task, step, ...)``."""

    x: Tensor
    """Normalised observations, ``(task, step, obs)``."""
    action: Tensor
    """The teacher's actions, ``(task, step, act)``."""
    final_x: Tensor
    """What is to be guessed: the first features of the demonstration's last ``x``,
    ``(task, step, guess)``."""
    action_weight: Tensor
    """Weight of a step in the task's mean error of actions, ``(task, step)``; zero for padding."""
    guess_weight: Tensor
    """The same for the error of the guess; zero for steps too late to guess from."""


class ImitationActor(nn.Module):
    """A perceptron over the observation and a linear guess of the final observation."""

    def __init__(self, obs: int, guess: int, width: int, act: int) -> None:
        super().__init__()
        self.guess = nn.Linear(obs, guess) if guess else None
        self.act = mlp(obs + guess, (width, width), act, gain=0.01)
        # the first guess is zero, the mean of normalised observations
        if self.guess is not None:
            nn.init.zeros_(self.guess.weight)
            nn.init.zeros_(self.guess.bias)

    def forward(self, x: Tensor, final_x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return actions ``(..., act)`` and the guess ``(..., guess)`` for observations ``x``.

        The action depends on ``final_x`` ``(..., guess)`` if it is given, else on the guess.
        """
        guess = x[..., :0] if self.guess is None else self.guess(x)
        condition = guess if final_x is None else final_x
        return self.act(torch.cat([x, condition], -1)), guess


class ImitationAgent(nn.Module):
    """A deterministic policy that adapts to demonstrations, and an inner rate for each weight.

    Its context is a copy of the policy's weights for each task.
    """

    privileged = False
    explores = False
    context_names = ("weights",)

    def __init__(self, dims: Dimensions, config: ImitationConfig) -> None:
        """Initialise weights from torch's global generator.

        Raises:
            MetarobotError: A setting out of bounds, ``worlds`` not a multiple of ``rollouts``, or
                more observations to guess than there are.
        """
        super().__init__()
        check_bounds(config)
        if config.worlds % config.rollouts:
            raise MetarobotError(
                f"worlds = {config.worlds} is not a multiple of rollouts = {config.rollouts}"
            )
        if config.guess > dims.obs:
            raise MetarobotError(
                f"guess must be at most {dims.obs}, the number of observations, not {config.guess}"
            )
        self.config = config
        self.norm = RunningNorm(dims.obs)
        self.actor = ImitationActor(dims.obs, config.guess, config.width, dims.act)

        # the layer that guesses has an inner rate of its own
        rates = []
        for name, weights in self.actor.named_parameters():
            rate = config.guess_lr if name.startswith("guess") else config.inner_lr
            rates.append(torch.full((weights.numel(),), rate))
        self.rates = nn.Parameter(torch.cat(rates), requires_grad=config.inner_steps > 0)

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return a copy of the initial weights for each task, ``(task, P)``."""
        weights = nn.utils.parameters_to_vector(self.actor.parameters()).detach()
        return (weights.expand(worlds, -1),)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act with each task's own weights; the worlds of a task are consecutive."""
        (weights,) = context
        x = self.norm(percept.obs).view(len(weights), -1, percept.obs.shape[-1])

        def task_action(task_weights: Tensor, task_x: Tensor) -> Tensor:
            action: Tensor = call_with_weights(self.actor, task_weights, task_x)[0]
            return action

        action: Tensor = vmap_tasks(task_action)(weights, x)
        return action.flatten(0, 1), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Take gradient steps on demonstrations of the task."""
        (weights,) = context
        rates = self.rates.detach()
        support = self.demonstration_batch(episode, len(weights))
        for _ in range(self.config.inner_steps):
            # θ' = θ + α ∇J(θ)
            weights = weights + rates * per_task_gradients(self.objective, weights, support)
        return (weights,)

    def demonstration_batch(self, episode: Rollout, tasks: int) -> DemonstrationBatch:
        """Prepare demonstrations for gradient steps; the worlds of a task are consecutive."""
        x = self.norm(episode.obs)
        time = torch.arange(len(x), device=x.device)
        worlds = torch.arange(x.shape[1], device=x.device)

        # s_T, the observation at a demonstration's last valid step, for all its steps
        last_step = (episode.valid.sum(0) - 1).clamp_min(0)
        final_x = x[last_step, worlds, : self.config.guess].expand(len(x), -1, -1)

        # The guess is trained on the first steps only: it must come from the situation in which a
        # demonstration begins, not from where the motion already leads.
        valid = episode.valid.to(episode.obs.dtype)
        early = valid * (time < self.config.early)[:, None]
        return DemonstrationBatch(
            x=by_task(x, tasks),
            action=by_task(episode.action, tasks),
            final_x=by_task(final_x, tasks),
            action_weight=_mean_weights(by_task(valid, tasks)),
            guess_weight=_mean_weights(by_task(early, tasks)),
        )

    def objective(self, weights: Tensor, batch: DemonstrationBatch) -> Tensor:
        """Return minus the mean squared errors of one task's actions and of its guess, summed."""
        action, guess = call_with_weights(self.actor, weights, batch.x, batch.final_x)
        # J = −mean_t ‖π(s_t, s_T) − a_t‖² / act − mean_{t < early} ‖g(s_t) − s_T‖²
        action_error = (action - batch.action).square().mean(-1)
        guess_error = (guess - batch.final_x).square().sum(-1)
        objective: Tensor = (
            -(batch.action_weight * action_error).sum() - (batch.guess_weight * guess_error).sum()
        )
        return objective


def _mean_weights(mask: Tensor) -> Tensor:
    """Turn a mask ``(task, step)`` of ones and zeros into the weights of each task's mean."""
    return mask / mask.sum(1, keepdim=True).clamp_min(1.0)


class Imitator:
    """Trains an ``ImitationAgent`` on trials of demonstrations: support, then query."""

    def __init__(self, config: ImitationConfig, dims: Dimensions) -> None:
        self.config = config
        self.agent = ImitationAgent(dims, config)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), lr=config.lr, eps=1e-5)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take one outer step."""
        c = self.config
        agent = self.agent
        support_episode, query_episode = trials.episodes
        agent.norm.update(support_episode.obs[support_episode.valid])
        tasks = support_episode.valid.shape[1] // c.rollouts
        support = agent.demonstration_batch(support_episode, tasks)
        query = agent.demonstration_batch(query_episode, tasks)

        # θ_i: the weights of task i after the inner steps on its support
        (start,) = agent.begin(tasks)
        rates = agent.rates.detach()
        derivatives = first_order_derivatives if c.first_order else exact_derivatives
        trajectory = adapt_weights(
            agent.objective, start, rates, [support] * c.inner_steps, derivatives
        )

        # meta-gradient ∇ mean_i J_i(θ_i) by initial weights and rates, with θ_i the adapted weights
        outer_gradients = per_task_gradients(agent.objective, trajectory.weights, query)
        weights_gradient, rates_gradient = trajectory.vjp(outer_gradients)
        set_ascent_gradients(agent.actor, weights_gradient.mean(0))
        agent.rates.grad = -rates_gradient.mean(0) if agent.rates.requires_grad else None
        set_learning_rate(self.optimiser, decayed(c.lr, c.lr_end, progress))
        norm = clip_and_step(self.optimiser, agent.parameters(), c.grad_norm)

        with torch.no_grad():
            loss_before = -vmap_tasks(agent.objective)(start, query).mean()
            loss = -vmap_tasks(agent.objective)(trajectory.weights, query).mean()
        return {
            "train/loss_before": float(loss_before),
            "train/loss": float(loss),
            "train/grad_norm": float(norm),
        }

    def state(self) -> dict[str, Tensor]:
        """Return weights, rates, the normaliser and the optimiser."""
        return flatten_state(self.optimiser, agent=self.agent)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.optimiser, agent=self.agent)


imitation = AgentKind(
    name="imitation",
    doc="MAML on demonstrations: a few of them, and it does as they show.",
    config=ImitationConfig,
    imitates=True,
    build=Imitator,
)
