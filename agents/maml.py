"""MAML-TRPO: initial weights from which a few policy gradient steps on a new task are enough (Finn
et al. 2017).

The outer step is TRPO (Schulman et al. 2015): the exact second-order meta-gradient of the return
after adaptation, a natural direction in the space of adapted policies, and a line search under a
bound on their KL divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from metarobot.learning import trust_region as trust
from metarobot.learning.agent_interface import AgentKind, Dimensions
from metarobot.learning.gradient_agent import (
    GradientAgent,
    InnerBatch,
    InnerConfig,
    ignored_rollouts,
)
from metarobot.learning.meta_gradient import (
    Derivative,
    Objective,
    Product,
    exact_derivatives,
    first_order_derivatives,
    per_task_gradients,
    vmap_tasks,
)
from metarobot.learning.outer_critic import OuterCritic
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(InnerConfig):
    """Settings of MAML-TRPO; the defaults reach the results in the README."""

    kl: float = 0.2
    """Bound on the mean KL divergence of the adapted policies in one outer step, at the start."""
    kl_end: float = 0.1
    """Fraction of it that is left at the end; linear between."""
    cg_steps: int = 10
    """Conjugate gradient iterations."""
    damping: float = 1e-3
    """Multiple of the identity added to the Fisher matrix."""
    thin: int = 4
    """One step in this many enters the Fisher-vector products; gradient and line search take
    all."""
    shrink: float = 0.7
    """Factor between tries of the line search."""
    tries: int = 10
    """Tries of the line search; after the last the old weights stay."""


class MAML:
    """Trains a ``GradientAgent`` by TRPO on what its adapted policies earn."""

    derivative: Derivative = staticmethod(exact_derivatives)

    def __init__(self, config: MAMLConfig, shapes: Dimensions) -> None:
        self.config = config
        self.agent = GradientAgent(shapes, config)
        self.critic = OuterCritic(shapes, config.outer_gamma, config.lam)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take one outer step."""
        c, agent = self.config, self.agent
        *support, query = agent.batches(trials)
        query, explained = agent.with_critic_advantages(query, trials, self.critic, seed)
        start = agent.vector()
        path = agent.adapt_meta_parameters(start, support, self.derivative)
        gradient = agent.meta_vjp(path, per_task_gradients(agent.surrogate, path.weights, query))
        fisher = self.fisher(start, support, query)
        direction = trust.conjugate_gradient(fisher, gradient, c.cg_steps)
        bound = c.kl * (1.0 - progress * (1.0 - c.kl_end))
        objective = partial(self.objective, start, support, query)
        step, found = trust.backtracking_line_search(
            trust.scale_to_kl_bound(direction, fisher, bound), objective, bound, c.shrink, c.tries
        )
        agent.assign(start + step)
        agent.learn_norm(trials)
        metrics = {
            "policy_objective": found.gain,
            "kl_divergence_loss": found.divergence,
            "is_line_search_success": float(found.success),
            "line_search_tries": float(found.tries),
            "grad_norm": float(gradient.norm()),
            "std": float(agent.policy.log_std.detach().exp().mean()),
            "inner_lr": float(agent.rates.detach().mean()),
            "explained_variance": float(explained),
            "ignored_rollouts": ignored_rollouts(trials),
        }
        return {f"train/{k}": v for k, v in metrics.items()}

    def fisher(self, start: Tensor, support: list[InnerBatch], query: InnerBatch) -> Product:
        """Return the product of a direction ``(2 P,)`` with the Fisher matrix of the adapted
        policies.

        Adapted policies move by J v, so the matrix is Jᵀ F J with J the derivative of the path and
        F the Hessian of the KL divergence at its end, where the divergence is zero.
        """
        n, agent = self.config.thin, self.agent
        path = agent.adapt_meta_parameters(start, support, partial(_thinned, self.derivative, n))
        _, kl = exact_derivatives(agent.divergence, path.weights, query.thin(n))
        return lambda v: agent.meta_vjp(path, kl(agent.meta_jvp(path, v))) + self.config.damping * v

    def objective(
        self, start: Tensor, support: list[InnerBatch], query: InnerBatch, step: Tensor
    ) -> tuple[float, float]:
        """Return what adapted policies earn and how far they are from those that acted, after a
        step ``(2 P,)``.
        """
        agent = self.agent
        weights = agent.adapt_meta_parameters(
            start + step, support, first_order_derivatives
        ).weights
        gain, divergence = (
            float(vmap_tasks(f)(weights, query).mean()) for f in (agent.surrogate, agent.divergence)
        )
        return gain, divergence

    def state(self) -> dict[str, Tensor]:
        """Return weights, rates, the normaliser and the critic."""
        agent = {f"agent.{k}": v.detach().clone() for k, v in self.agent.state_dict().items()}
        return agent | self.critic.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        mine = {k.removeprefix("agent."): v for k, v in state.items() if k.startswith("agent.")}
        self.agent.load_state_dict(mine)
        self.critic.load(state)


class FirstOrderMAML(MAML):
    """MAML that takes the derivative of an inner step for the identity."""

    derivative: Derivative = staticmethod(first_order_derivatives)


def _thinned(
    derivative: Derivative, n: int, objective: Objective, weights: Tensor, data: InnerBatch
) -> tuple[Any, Product]:
    """Return the gradient on all steps, and the Hessian product on one in ``n``."""
    return per_task_gradients(objective, weights, data), derivative(
        objective, weights, data.thin(n)
    )[1]


maml = AgentKind(
    name="maml",
    doc="MAML-TRPO: weights from which a few gradient steps adapt.",
    config=MAMLConfig,
    build=MAML,
)
fomaml = AgentKind(
    name="fomaml",
    doc="MAML-TRPO with first-order meta-gradients.",
    config=MAMLConfig,
    build=FirstOrderMAML,
)
