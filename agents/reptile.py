"""Reptile: move the initial weights towards the adapted weights (Nichol et al. 2018).

No derivative of the inner steps is taken: the agent adapts to every episode of a trial, and the
initial weights follow the mean of the tasks' adapted weights. With a single inner step this is
joint training, so it takes several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from metarobot.config_bounds import Bounds, Fraction, NonNegative
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Dimensions
from metarobot.learning.maml_agent import GradientAgent, InnerConfig, ignored_rollouts
from metarobot.learning.meta_gradient import clip_and_step, set_ascent_gradients
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.ppo_core import decayed, set_learning_rate
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class ReptileConfig(InnerConfig):
    """Settings of Reptile."""

    inner_lr: Annotated[float, Bounds(1e-6, 100.0)] = 0.1
    """Size of an inner step."""
    inner_steps: Annotated[int, Bounds(1, 100)] = 5
    """Gradient steps on each episode's rollouts."""
    learn_rates: bool = False
    """Must stay off: Reptile takes no derivative by the rates."""
    lr: NonNegative = 1e-3
    """Adam's learning rate at the start, on the mean change of the tasks' weights."""
    lr_end: Fraction = 0.05
    """Fraction of it that is left at the end; linear between."""
    grad_norm: NonNegative = 1.0
    """Bound on the norm of the mean change."""


class Reptile:
    """Trains a ``GradientAgent`` by moving its initial weights towards the adapted ones."""

    def __init__(self, config: ReptileConfig, dims: Dimensions) -> None:
        if config.learn_rates:
            raise MetarobotError(
                "learn_rates must be False for Reptile, not True: it takes no derivative by the "
                "rates"
            )
        self.config = config
        self.agent = GradientAgent(dims, config)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), lr=config.lr, eps=1e-5)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take one outer step."""
        c = self.config
        agent = self.agent
        tasks = trials.episodes[0].reward.shape[1] // c.rollouts
        start = agent.begin(tasks)
        context = start
        for episode in trials.episodes:
            context = agent.adapt(context, episode)

        # g = mean_i (θ_i − θ), with θ_i the adapted weights of task i; ascended by Adam
        reptile_gradient = (context[0] - start[0]).mean(0)
        set_learning_rate(self.optimiser, decayed(c.lr, c.lr_end, progress))
        set_ascent_gradients(agent.policy, reptile_gradient)
        # inner steps that diverge give a norm that is not finite, and no outer step
        norm = clip_and_step(self.optimiser, agent.policy.parameters(), c.grad_norm)
        agent.update_norm(trials)

        return {
            # "way" is the metric's name since the first logs
            "train/way": float(norm),
            "train/std": float(agent.policy.log_std.detach().exp().mean()),
            "train/ignored_rollouts": ignored_rollouts(trials),
        }

    def state(self) -> dict[str, Tensor]:
        """Return weights, the normaliser and the optimiser."""
        return flatten_state(self.optimiser, agent=self.agent)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.optimiser, agent=self.agent)


reptile = AgentKind(
    name="reptile",
    doc="Reptile: initial weights that follow the adapted ones.",
    config=ReptileConfig,
    build=Reptile,
)
