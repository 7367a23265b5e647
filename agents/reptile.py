"""Reptile: move the initial weights towards where adaptation leads (Nichol et al. 2018).

No derivative of the inner steps is taken: every episode of a trial is adapted to, and the initial
weights follow the mean of the tasks' adapted weights. With a single inner step this is joint
training, so it takes several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Dimensions
from metarobot.learning.gradient_agent import GradientAgent, InnerConfig, ignored_rollouts
from metarobot.learning.meta_gradient import set_ascent_gradients
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class ReptileConfig(InnerConfig):
    """Settings of Reptile."""

    inner_lr: float = 0.1
    """Size of an inner step."""
    inner_steps: int = 5
    """Gradient steps on each episode's rollouts."""
    learn_rates: bool = False
    """Must stay off: nothing is differentiated by the rates."""
    lr: float = 1e-3
    """Adam's learning rate at the start, on the mean way of the tasks' weights."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    grad_norm: float = 1.0
    """Bound on the way's length."""


class Reptile:
    """Trains a ``GradientAgent`` by following its adapted weights."""

    def __init__(self, config: ReptileConfig, shapes: Dimensions) -> None:
        if config.learn_rates:
            raise MetarobotError(
                "learn_rates must be False for Reptile, not True: nothing is differentiated by the rates"
            )
        self.config = config
        self.agent = GradientAgent(shapes, config)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), lr=config.lr, eps=1e-5)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take one outer step."""
        c, agent = self.config, self.agent
        context = start = agent.begin(trials.episodes[0].reward.shape[1] // c.rollouts)
        for episode in trials.episodes:
            context = agent.adapt(context, episode)
        way = (context[0] - start[0]).mean(0)
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.lr_end))
        set_ascent_gradients(agent.policy, way)
        norm = nn.utils.clip_grad_norm_(agent.policy.parameters(), c.grad_norm)
        if norm.isfinite():  # inner steps that diverge lead nowhere
            self.optimiser.step()
        agent.learn_norm(trials)
        metrics = {
            "way": float(norm.nan_to_num(0.0, 0.0)),
            "std": float(agent.policy.log_std.detach().exp().mean()),
        }
        return {
            f"train/{k}": v
            for k, v in {**metrics, "ignored_rollouts": ignored_rollouts(trials)}.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return weights, the normaliser and the optimiser."""
        return flatten_state(self.optimiser, agent=self.agent)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        restore_state(state, self.optimiser, agent=self.agent)


reptile = AgentKind(
    name="reptile",
    doc="Reptile: initial weights that follow the adapted ones.",
    config=ReptileConfig,
    build=Reptile,
)
