"""Inner-loop adaptation by gradient steps for many tasks at once, and its derivatives.

Weights are flat vectors: ``(P,)`` for one task, ``(task, P)`` for many. An objective is written for
one task, as a function of its weights and data that is to be increased; ``vmap_tasks`` adds the
task axis, so that nothing here loops over tasks.

An inner step is θ' = θ + α ∇J(θ), with step sizes ("rates") α shared by all weights or one for each
(Meta-SGD, Li et al. 2017). Its Jacobian I + α ∇²J(θ) is the second-order term of MAML's
meta-gradient (Finn et al. 2017, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

Objective = Callable[[Tensor, Any], Tensor]
"""(weights ``(P,)``, data of one task) -> a scalar to increase."""
MatrixVectorProduct = Callable[[Tensor], Tensor]
"""Multiplies a symmetric matrix, which is never formed, by a vector.

A Hessian-vector product maps ``(task, P)`` to ``(task, P)``, each task's row by its own Hessian."""
DerivativeRule = Callable[[Objective, Tensor, Any], tuple[Tensor, MatrixVectorProduct]]
"""(objective, weights ``(task, P)``, data of all tasks) -> gradients ``(task, P)`` and
Hessian-vector product. Which rule is used decides between second-order and first-order MAML."""

_loops_over_tasks: ContextVar[bool] = ContextVar("loops_over_tasks", default=False)
"""Whether ``vmap_tasks`` loops in Python, in this thread; set by ``loop_over_tasks``."""


def call_with_weights(module: nn.Module, weights: Tensor, *inputs: Tensor) -> Any:
    """Run a module with its parameters taken from ``weights`` ``(P,)``; differentiable in them."""
    names = [name for name, _ in module.named_parameters()]
    parameters = dict(zip(names, unflatten(weights, module), strict=True))
    return functional_call(module, parameters, inputs)


def unflatten(vector: Tensor, module: nn.Module) -> list[Tensor]:
    """Cut a vector ``(P,)`` into the shapes of a module's parameters, in their order."""
    parameters = list(module.parameters())
    pieces = torch.split(vector, [p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def set_ascent_gradients(module: nn.Module, direction: Tensor) -> None:
    """Set a module's gradients so that a minimiser moves it along ``direction`` ``(P,)``.

    Parameters that do not require a gradient get none.
    """
    for parameter, piece in zip(module.parameters(), unflatten(direction, module), strict=True):
        parameter.grad = -piece if parameter.requires_grad else None


def clip_and_step(
    optimiser: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float
) -> Tensor:
    """Clip the gradients' norm and take a step, unless they are not finite.

    Returns:
        The norm before clipping, ``()``. Where it is not finite the weights stay.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if norm.isfinite():
        optimiser.step()
    return norm


def vmap_tasks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function of one task's tensors over the task axis of all its arguments.

    By ``torch.func.vmap``, or by a Python loop within ``loop_over_tasks``. Arguments are tensors or
    (named) tuples of them; the function returns a tensor or a tuple of tensors.
    """
    if _loops_over_tasks.get():
        return _loop(function)
    mapped: Callable[..., Any] = vmap(function)
    return mapped


@contextmanager
def loop_over_tasks() -> Iterator[None]:
    """Let ``vmap_tasks`` loop in Python within this context, in this thread only.

    The ONNX export needs it, because its tracer does not know ``vmap``; tests and benchmarks
    compare ``vmap`` with it.
    """
    token = _loops_over_tasks.set(True)
    try:
        yield
    finally:
        _loops_over_tasks.reset(token)


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function over tasks one after the other, as ``vmap`` does at once."""

    def call_task_by_task(*arguments: Any) -> Any:
        results = []
        for i in range(len(arguments[0])):
            results.append(function(*(_select_task(argument, i) for argument in arguments)))
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))

    return call_task_by_task


def _select_task(data: Any, i: int) -> Any:
    """Index the task axis of a tensor, or of every tensor of a (named) tuple."""
    if isinstance(data, Tensor):
        return data[i]
    rows = [_select_task(x, i) for x in data]
    is_named_tuple = hasattr(data, "_fields")
    return type(data)(*rows) if is_named_tuple else tuple(rows)


def per_task_gradients(objective: Objective, weights: Tensor, data: Any) -> Tensor:
    """Return every task's gradient ∇J(θ), ``(task, P)``, at its own weights ``(task, P)``."""
    gradients: Tensor = vmap_tasks(grad(objective))(weights, data)
    return gradients


def exact_derivatives(
    objective: Objective, weights: Tensor, data: Any
) -> tuple[Tensor, MatrixVectorProduct]:
    """Return every task's gradient ``(task, P)`` and its Hessian-vector product.

    The product is reverse mode over reverse mode: as the Hessian is symmetric, the vector-Jacobian
    product of the gradient is ∇²J(θ) v.
    """
    result = vjp(lambda w: per_task_gradients(objective, w, data), weights)
    gradients: Tensor = result[0]
    vjp_of_gradients = result[1]

    def hessian_product(v: Tensor) -> Tensor:
        product: Tensor = vjp_of_gradients(v)[0]
        return product

    return gradients, hessian_product


def first_order_derivatives(
    objective: Objective, weights: Tensor, data: Any
) -> tuple[Tensor, MatrixVectorProduct]:
    """Return every task's gradient, and a Hessian-vector product that is zero.

    This is first-order MAML (Finn et al. 2017, section 5.2).
    """
    return per_task_gradients(objective, weights, data), torch.zeros_like


@dataclass(frozen=True)
class InnerStep:
    """One inner step of every task: the weights it started from and the derivatives there."""

    start: Tensor
    """Weights before the step, ``(task, P)``."""
    gradient: Tensor
    """∇J at ``start``, ``(task, P)``."""
    hessian: MatrixVectorProduct
    """Product with ∇²J at ``start``."""


@dataclass(frozen=True)
class InnerTrajectory:
    """The trajectory of inner steps, θ_{i+1} = θ_i + α ∇J_i(θ_i), and its derivatives.

    The Jacobians of a step are I + α ∇²J_i by the weights and ∇J_i by the rates. As ∇²J_i is
    symmetric, one Hessian-vector product serves forward and reverse mode.
    """

    weights: Tensor
    """Adapted weights, after the last step, ``(task, P)``."""
    rates: Tensor
    """Step sizes α, ``()`` or ``(P,)``."""
    steps: tuple[InnerStep, ...]

    def first(self, k: int) -> InnerTrajectory:
        """Return the trajectory of the first ``k`` steps, or this one if it has no more."""
        if k >= len(self.steps):
            return self
        return InnerTrajectory(self.steps[k].start, self.rates, self.steps[:k])

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vector-Jacobian product of the adapted weights, reverse mode.

        Args:
            cotangent: Gradient of an outer objective at the adapted weights, ``(task, P)``.

        Returns:
            Its gradients at the initial weights and at the rates, ``(task, P)`` each.
        """
        # going back through a step, with u the gradient at its end:
        #   ∂/∂α += u ∇J(θ),   ∂/∂θ = (I + ∇²J(θ) α) u
        rates_gradient = torch.zeros_like(cotangent)
        for step in reversed(self.steps):
            rates_gradient = rates_gradient + step.gradient * cotangent
            cotangent = cotangent + step.hessian(self.rates * cotangent)
        return cotangent, rates_gradient

    def jvp(self, weights_tangent: Tensor, rates_tangent: Tensor) -> Tensor:
        """Return the Jacobian-vector product of the adapted weights, forward mode.

        Args:
            weights_tangent: Direction of the initial weights, ``(task, P)``.
            rates_tangent: Direction of the rates, of their shape.

        Returns:
            Directional derivative of the adapted weights, ``(task, P)``.
        """
        # dθ' = dθ + α ∇²J(θ) dθ + dα ∇J(θ)
        tangent = weights_tangent
        for step in self.steps:
            curvature = step.hessian(tangent)
            tangent = tangent + self.rates * curvature + rates_tangent * step.gradient
        return tangent


def adapt_weights(
    objective: Objective,
    weights: Tensor,
    rates: Tensor,
    data: Sequence[Any],
    derivatives: DerivativeRule = exact_derivatives,
) -> InnerTrajectory:
    """Take one inner step on each element of ``data``, in order.

    Args:
        objective: What each step increases.
        weights: Initial weights, ``(task, P)``.
        rates: Step sizes, ``()`` or ``(P,)``.
        data: For each step the data of all tasks: tensors with a leading task axis.
        derivatives: How gradients and Hessian-vector products are computed.
    """
    steps = []
    for batch in data:
        gradient, hessian = derivatives(objective, weights, batch)
        steps.append(InnerStep(weights, gradient, hessian))
        # θ' = θ + α ∇J(θ)
        weights = weights + rates * gradient
    return InnerTrajectory(weights, rates, tuple(steps))
