"""ProMP: MAML by several clipped outer steps on the same trials (Rothfuss et al. 2019); without its
penalty, MAML-PPO.

The meta-gradient is the low variance estimator of the inner step's likelihood-ratio objective;
PPO's clip bounds how far the adapted policies move from those that acted, and a penalty on the KL
divergence of the policies they start from keeps the inner steps' data valid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from metarobot.learning.agent_interface import AgentKind, Dimensions
from metarobot.learning.gradient_agent import (
    GradientAgent,
    InnerBatch,
    InnerConfig,
    ignored_rollouts,
)
from metarobot.learning.meta_gradient import (
    first_order_derivatives,
    per_task_gradients,
    set_ascent_gradients,
    vmap_tasks,
)
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.outer_critic import OuterCritic
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class ProMPConfig(InnerConfig):
    """Settings of ProMP; the defaults reach the results in the README."""

    worlds: int = 200
    """Worlds an iteration: tasks times rollouts."""
    lr: float = 2e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    epochs: int = 10
    """Outer steps on each iteration's trials."""
    clip: float = 0.3
    """Bound on the probability ratio of the adapted policies."""
    penalty: float = 5e-4
    """Weight of the KL divergence of the policies that inner steps start from."""
    grad_norm: float = 1.0
    """Bound on the meta-gradient's norm."""
    kl_stop: float = 0.3
    """KL divergence of the adapted policies at which an iteration's steps stop; the step that broke
    it is undone."""


@dataclass(frozen=True, kw_only=True)
class MAMLPPOConfig(ProMPConfig):
    """Settings of MAML-PPO: ProMP without the penalty."""

    penalty: float = 0.0


class ProMP:
    """Trains a ``GradientAgent`` by clipped meta-gradients."""

    def __init__(self, config: ProMPConfig, shapes: Dimensions) -> None:
        self.config = config
        self.agent = GradientAgent(shapes, config)
        self.critic = OuterCritic(shapes, config.outer_gamma, config.lam)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), lr=config.lr, eps=1e-5)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take the outer steps of one iteration."""
        c, agent = self.config, self.agent
        *support, query = agent.batches(trials)
        query, explained = agent.with_critic_advantages(query, trials, self.critic, seed)
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.lr_end))
        taken, kl, undone, norm = 0, 0.0, 0.0, torch.zeros(())
        for _ in range(c.epochs):
            before = self.state()
            norm = self._step(support, query)
            adapted = agent.adapt_meta_parameters(
                agent.vector(), support, first_order_derivatives
            ).weights
            reached = float(vmap_tasks(agent.divergence)(adapted, query).mean())
            if not reached <= c.kl_stop:
                self.load(before)
                undone = 1.0
                break
            taken, kl = taken + 1, reached
        agent.learn_norm(trials)
        metrics = {
            "gradient_steps": float(taken),
            "approx_kl": kl,
            "undone": undone,
            "grad_norm": float(norm),
            "learning_rate": float(self.optimiser.param_groups[0]["lr"]),
            "std": float(agent.policy.log_std.detach().exp().mean()),
            "inner_lr": float(agent.rates.detach().mean()),
            "explained_variance": float(explained),
            "ignored_rollouts": ignored_rollouts(trials),
        }
        return {f"train/{k}": v for k, v in metrics.items()}

    def _step(self, support: list[InnerBatch], query: InnerBatch) -> Tensor:
        """Take one outer step; return the meta-gradient's norm before it is bounded."""
        agent = self.agent
        path = agent.adapt_meta_parameters(agent.vector(), support)
        gradient = agent.meta_vjp(path, per_task_gradients(self.clipped, path.weights, query))
        for k, batch in enumerate(support):
            start = path.first(k * self.config.inner_steps)
            gradient -= self.config.penalty * agent.meta_vjp(
                start, per_task_gradients(agent.divergence, start.weights, batch)
            )
        set_ascent_gradients(agent, gradient)
        norm = nn.utils.clip_grad_norm_(agent.parameters(), self.config.grad_norm)
        self.optimiser.step()
        return norm

    def clipped(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return E[min(r A, clip(r, 1 − ε, 1 + ε) A)] of one task."""
        ratio, c = self.agent.ratio(weights, batch), self.config
        bounded = ratio.clamp(1 - c.clip, 1 + c.clip)
        return (
            batch.weight * torch.minimum(ratio * batch.advantage, bounded * batch.advantage)
        ).sum()

    def state(self) -> dict[str, Tensor]:
        """Return weights, rates, the normaliser, the optimiser and the critic."""
        return flatten_state(self.optimiser, agent=self.agent) | self.critic.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        restore_state(state, self.optimiser, agent=self.agent)
        self.critic.load(state)


promp = AgentKind(
    name="promp", doc="ProMP: MAML by clipped outer steps.", config=ProMPConfig, build=ProMP
)
maml_ppo = replace(
    promp, name="maml-ppo", doc="MAML-PPO: ProMP without its penalty.", config=MAMLPPOConfig
)
