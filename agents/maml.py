"""MAML-TRPO: initial weights from which a few policy gradient steps adapt (Finn et al. 2017).

The outer step is TRPO (Schulman et al. 2015) on the return after adaptation: the exact second-order
meta-gradient, a natural gradient direction in the space of adapted policies, and a line search
under a bound on their KL divergence from the policies that acted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from metarobot.config_bounds import Count, Fraction, NonNegative
from metarobot.learning.agent_interface import AgentKind, Dimensions
from metarobot.learning.maml_agent import (
    GradientAgent,
    InnerBatch,
    InnerConfig,
    ignored_rollouts,
)
from metarobot.learning.meta_gradient import (
    DerivativeRule,
    MatrixVectorProduct,
    Objective,
    exact_derivatives,
    first_order_derivatives,
    per_task_gradients,
    vmap_tasks,
)
from metarobot.learning.outer_critic import OuterCritic
from metarobot.learning.ppo_core import decayed
from metarobot.learning.trust_region import (
    backtracking_line_search,
    conjugate_gradient,
    scale_to_kl_bound,
)
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(InnerConfig):
    """Settings of MAML-TRPO; the defaults reach the published results."""

    kl: NonNegative = 0.2
    """Bound on the mean KL divergence of the adapted policies in one outer step, at the start."""
    kl_end: Fraction = 0.1
    """Fraction of it that is left at the end; linear between."""
    cg_steps: Count = 10
    """Conjugate gradient iterations."""
    damping: NonNegative = 1e-3
    """Multiple of the identity added to the Fisher matrix."""
    thin: Count = 4
    """One step in this many enters the Fisher-vector products; gradient and line search take
    all."""
    shrink: Fraction = 0.7
    """Factor between tries of the line search."""
    tries: Count = 10
    """Tries of the line search; after the last the old weights stay."""


class MAML:
    """Trains a ``GradientAgent`` by TRPO on the returns of its adapted policies."""

    derivatives: DerivativeRule = staticmethod(exact_derivatives)

    def __init__(self, config: MAMLConfig, dims: Dimensions) -> None:
        self.config = config
        self.agent = GradientAgent(dims, config)
        self.critic = OuterCritic(dims, config.outer_gamma, config.lam)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Take one outer step.

        The last episode of the trials is the query, the others are the support.
        """
        c = self.config
        agent = self.agent
        *support, query = agent.batches(trials)
        query, explained = agent.with_critic_advantages(query, trials, self.critic, seed)

        # meta-gradient g = ∇ mean_i J_i(θ_i), with θ_i the adapted weights of task i
        start = agent.meta_parameters()
        trajectory = agent.adapt_meta_parameters(start, support, self.derivatives)
        outer_gradients = per_task_gradients(agent.surrogate, trajectory.weights, query)
        meta_gradient = agent.meta_vjp(trajectory, outer_gradients)

        # natural gradient F⁻¹ g, scaled to the KL bound δ (Schulman et al. 2015, appendix C)
        fisher = self.fisher(start, support, query)
        direction = conjugate_gradient(fisher, meta_gradient, c.cg_steps)
        kl_bound = decayed(c.kl, c.kl_end, progress)
        longest_step = scale_to_kl_bound(direction, fisher, kl_bound)

        objective = partial(self.objective, start, support, query)
        step, search = backtracking_line_search(
            longest_step, objective, kl_bound, c.shrink, c.tries
        )
        # zeros if no step was accepted
        agent.set_meta_parameters(start + step)
        agent.update_norm(trials)

        return {
            "train/policy_objective": search.gain,
            "train/kl_divergence_loss": search.divergence,
            "train/is_line_search_success": float(search.success),
            "train/line_search_tries": float(search.tries),
            "train/grad_norm": float(meta_gradient.norm()),
            "train/std": float(agent.policy.log_std.detach().exp().mean()),
            "train/inner_lr": float(agent.rates.detach().mean()),
            "train/explained_variance": float(explained),
            "train/ignored_rollouts": ignored_rollouts(trials),
        }

    def fisher(
        self, start: Tensor, support: list[InnerBatch], query: InnerBatch
    ) -> MatrixVectorProduct:
        """Return the Fisher-vector product of the adapted policies, on vectors ``(2 P,)``.

        In the meta-parameters the Fisher matrix is Jᵀ F J: J is the Jacobian of the adapted
        weights, F the Hessian of the KL divergence there, where the divergence is zero.
        """
        c = self.config
        agent = self.agent
        derivatives = partial(_thinned_derivatives, self.derivatives, c.thin)
        trajectory = agent.adapt_meta_parameters(start, support, derivatives)
        _, kl_hessian = exact_derivatives(agent.divergence, trajectory.weights, query.thin(c.thin))

        def fisher_product(v: Tensor) -> Tensor:
            # (Jᵀ F J + λ I) v
            moved_weights = agent.meta_jvp(trajectory, v)
            return agent.meta_vjp(trajectory, kl_hessian(moved_weights)) + c.damping * v

        return fisher_product

    def objective(
        self, start: Tensor, support: list[InnerBatch], query: InnerBatch, step: Tensor
    ) -> tuple[float, float]:
        """Evaluate a step ``(2 P,)`` of the meta-parameters.

        Returns:
            The surrogate objective of the adapted policies, and their KL divergence from those that
            acted; means over tasks.
        """
        agent = self.agent
        # only the adapted weights are wanted here, which both rules give
        trajectory = agent.adapt_meta_parameters(start + step, support, first_order_derivatives)
        surrogate = vmap_tasks(agent.surrogate)(trajectory.weights, query)
        divergence = vmap_tasks(agent.divergence)(trajectory.weights, query)
        return float(surrogate.mean()), float(divergence.mean())

    def state(self) -> dict[str, Tensor]:
        """Return weights, rates, the normaliser and the critic."""
        state = {
            f"agent.{name}": tensor.detach().clone()
            for name, tensor in self.agent.state_dict().items()
        }
        return state | self.critic.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        agent_state = {
            name.removeprefix("agent."): tensor
            for name, tensor in state.items()
            if name.startswith("agent.")
        }
        self.agent.load_state_dict(agent_state)
        self.critic.load(state)


class FirstOrderMAML(MAML):
    """MAML that takes the Jacobian of an inner step for the identity."""

    derivatives: DerivativeRule = staticmethod(first_order_derivatives)


def _thinned_derivatives(
    derivatives: DerivativeRule, n: int, objective: Objective, weights: Tensor, batch: InnerBatch
) -> tuple[Tensor, MatrixVectorProduct]:
    """Return the gradient on all steps, and the Hessian-vector product on one step in ``n``."""
    gradients = per_task_gradients(objective, weights, batch)
    _, hessian = derivatives(objective, weights, batch.thin(n))
    return gradients, hessian


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
