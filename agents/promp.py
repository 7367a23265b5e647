"""ProMP: MAML by several clipped outer steps on the same trials (Rothfuss et al. 2019).

The meta-gradient is the low variance estimator of the inner step's likelihood-ratio objective;
PPO's clip bounds how far the adapted policies move from those that acted, and a penalty on the KL
divergence of the policies they start from keeps the inner steps' data valid. Without the penalty it
is MAML-PPO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from metarobot.config_bounds import Count, Fraction, NonNegative
from metarobot.learning.agent_interface import AgentKind, Dimensions
from metarobot.learning.maml_agent import (
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
from metarobot.learning.ppo_core import clipped_surrogate, decayed, set_learning_rate
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class ProMPConfig(InnerConfig):
    """Settings of ProMP; the defaults reach the published results."""

    worlds: Count = 200
    """Worlds an iteration: tasks times rollouts."""
    lr: NonNegative = 2e-3
    """Adam's learning rate at the start."""
    lr_end: Fraction = 0.05
    """Fraction of it that is left at the end; linear between."""
    epochs: Count = 10
    """Outer steps on each iteration's trials."""
    clip: NonNegative = 0.3
    """Bound ε on how far the importance ratio of the adapted policies is from 1."""
    penalty: NonNegative = 5e-4
    """Weight η of the KL divergence of the policies that inner steps start from."""
    grad_norm: NonNegative = 1.0
    """Bound on the meta-gradient's norm."""
    kl_stop: NonNegative = 0.3
    """KL divergence of the adapted policies at which an iteration's steps stop; the step that broke
    it is undone."""


@dataclass(frozen=True, kw_only=True)
class MAMLPPOConfig(ProMPConfig):
    """Settings of MAML-PPO: ProMP without the penalty."""

    penalty: NonNegative = 0.0


class ProMP:
    """Trains a ``GradientAgent`` by clipped meta-gradients."""

    def __init__(self, config: ProMPConfig, dims: Dimensions) -> None:
        self.config = config
        self.agent = GradientAgent(dims, config)
        self.critic = OuterCritic(dims, config.outer_gamma, config.lam)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), lr=config.lr, eps=1e-5)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take the outer steps of one iteration.

        The last episode of the trials is the query, the others are the support.
        """
        c = self.config
        agent = self.agent
        *support, query = agent.batches(trials)
        query, explained = agent.with_critic_advantages(query, trials, self.critic, seed)
        set_learning_rate(self.optimiser, decayed(c.lr, c.lr_end, progress))

        gradient_steps = 0
        kl = 0.0
        undone = False
        norm = torch.zeros(())
        for _ in range(c.epochs):
            state_before = self.state()
            norm = self._outer_step(support, query)

            kl_after = self._adapted_divergence(support, query)
            if not kl_after <= c.kl_stop:  # written so that NaN is undone too
                self.load(state_before)
                undone = True
                break
            gradient_steps += 1
            kl = kl_after
        agent.update_norm(trials)

        return {
            "train/gradient_steps": float(gradient_steps),
            "train/approx_kl": kl,
            "train/undone": float(undone),
            "train/grad_norm": float(norm),
            "train/learning_rate": float(self.optimiser.param_groups[0]["lr"]),
            "train/std": float(agent.policy.log_std.detach().exp().mean()),
            "train/inner_lr": float(agent.rates.detach().mean()),
            "train/explained_variance": float(explained),
            "train/ignored_rollouts": ignored_rollouts(trials),
        }

    def _outer_step(self, support: list[InnerBatch], query: InnerBatch) -> Tensor:
        """Take one outer step; return the meta-gradient's norm before it is clipped."""
        c = self.config
        agent = self.agent

        # Rothfuss et al. (2019), section 6: J = J_clip(θ_K) − η Σ_k KL(θ_k), where θ_k are the
        # weights that acted in support episode k, functions of the meta-parameters
        trajectory = agent.adapt_meta_parameters(agent.meta_parameters(), support)
        outer_gradients = per_task_gradients(self.clipped_objective, trajectory.weights, query)
        meta_gradient = agent.meta_vjp(trajectory, outer_gradients)
        for k, batch in enumerate(support):
            start = trajectory.first(k * c.inner_steps)
            kl_gradients = per_task_gradients(agent.divergence, start.weights, batch)
            meta_gradient -= c.penalty * agent.meta_vjp(start, kl_gradients)

        # A step whose numbers are not finite is taken as well: the KL bound undoes it.
        set_ascent_gradients(agent, meta_gradient)
        norm = nn.utils.clip_grad_norm_(agent.parameters(), c.grad_norm)
        self.optimiser.step()
        return norm

    def clipped_objective(self, weights: Tensor, batch: InnerBatch) -> Tensor:
        """Return PPO's clipped objective of one task, the mean over its steps."""
        ratio = self.agent.ratio(weights, batch)
        surrogate = clipped_surrogate(ratio, batch.advantage, self.config.clip)
        return (batch.step_weight * surrogate).sum()

    def _adapted_divergence(self, support: list[InnerBatch], query: InnerBatch) -> float:
        """Return the mean KL divergence of the adapted policies from those that acted."""
        agent = self.agent
        # only the adapted weights are wanted here, which the cheaper rule gives too
        trajectory = agent.adapt_meta_parameters(
            agent.meta_parameters(), support, first_order_derivatives
        )
        return float(vmap_tasks(agent.divergence)(trajectory.weights, query).mean())

    def state(self) -> dict[str, Tensor]:
        """Return weights, rates, the normaliser, the optimiser and the critic."""
        return flatten_state(self.optimiser, agent=self.agent) | self.critic.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.optimiser, agent=self.agent)
        self.critic.load(state)


promp = AgentKind(
    name="promp", doc="ProMP: MAML by clipped outer steps.", config=ProMPConfig, build=ProMP
)
maml_ppo = replace(
    promp, name="maml-ppo", doc="MAML-PPO: ProMP without its penalty.", config=MAMLPPOConfig
)
