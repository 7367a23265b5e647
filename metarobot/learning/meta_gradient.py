"""Inner loops: a few gradient steps for many tasks at once, and the derivative of where they lead.

Weights are flat: ``(P,)`` of one task, ``(task, P)`` of many. An objective takes the weights and
the data of one task and returns what to increase; ``each`` gives it the task axis, so nothing here
loops over tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

Objective = Callable[[Tensor, Any], Tensor]
"""(weights ``(P,)``, data of one task) -> a number to increase."""
Product = Callable[[Tensor], Tensor]
"""v ``(task, P)`` -> every task's symmetric matrix times its row of v."""
Derivative = Callable[[Objective, Tensor, Any], tuple[Tensor, Product]]
"""(objective, weights ``(task, P)``, data of all tasks) -> gradient ``(task, P)`` and product with
the Hessian."""


def call_with_weights(module: nn.Module, weights: Tensor, *inputs: Tensor) -> Any:
    """Run a module with its parameters taken from ``weights`` ``(P,)``; differentiable in them."""
    names = [k for k, _ in module.named_parameters()]
    return functional_call(
        module, dict(zip(names, unflatten(weights, module), strict=True)), inputs
    )


def unflatten(vector: Tensor, module: nn.Module) -> list[Tensor]:
    """Cut a vector ``(P,)`` into the shapes of a module's parameters, in their order."""
    parameters = list(module.parameters())
    parts = torch.split(vector, [p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def set_ascent_gradients(module: nn.Module, slope: Tensor) -> None:
    """Give a module's parameters the gradients with which a minimiser climbs along ``slope``
    ``(P,)``.
    """
    for p, part in zip(module.parameters(), unflatten(slope, module), strict=True):
        p.grad = -part if p.requires_grad else None


def vmap_tasks(f: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function of one task's tensors over the task axis of all its arguments: ``vmap``,
    unless ``looped``.
    """
    mapped: Callable[..., Any] = _map(f)
    return mapped


@contextmanager
def loop_over_tasks() -> Iterator[None]:
    """Map over tasks by a Python loop: what ``vmap`` is tested and timed against."""
    global _map
    _map = _loop
    try:
        yield
    finally:
        _map = vmap


def _loop(f: Callable[..., Any]) -> Callable[..., Any]:
    def over(*arguments: Any) -> Any:
        out = [f(*(_row(a, i) for a in arguments)) for i in range(len(arguments[0]))]
        return (
            torch.stack(out)
            if isinstance(out[0], Tensor)
            else tuple(map(torch.stack, zip(*out, strict=True)))
        )

    return over


def _row(data: Any, i: int) -> Any:
    if isinstance(data, Tensor):
        return data[i]
    rows = (_row(x, i) for x in data)
    return type(data)(*rows) if hasattr(data, "_fields") else tuple(rows)


_map: Callable[..., Any] = vmap


def per_task_gradients(objective: Objective, weights: Tensor, data: Any) -> Tensor:
    """Return every task's gradient ``(task, P)``."""
    gradient: Tensor = vmap_tasks(grad(objective))(weights, data)
    return gradient


def exact_derivatives(objective: Objective, weights: Tensor, data: Any) -> tuple[Tensor, Product]:
    """Return every task's gradient and the product with its Hessian, by reverse mode over reverse
    mode.
    """
    result = vjp(lambda w: per_task_gradients(objective, w, data), weights)
    return result[0], lambda v: result[1](v)[0]


def first_order_derivatives(
    objective: Objective, weights: Tensor, data: Any
) -> tuple[Tensor, Product]:
    """Return every task's gradient and take the Hessian for zero (Finn et al. 2017, section
    5.2).
    """
    return per_task_gradients(objective, weights, data), torch.zeros_like


@dataclass(frozen=True)
class InnerStep:
    """One inner step: the weights ``(task, P)`` it started from, and the first two derivatives
    there.
    """

    start: Tensor
    gradient: Tensor
    hessian: Product


@dataclass(frozen=True)
class InnerTrajectory:
    """Where inner steps led, and what that depends on.

    The derivative of a step ``θ' = θ + α ∇J(θ)`` is ``I + α ∇²J``, and ∇²J is symmetric: one
    Hessian-vector product serves both directions.
    """

    weights: Tensor
    """Weights after the last step, ``(task, P)``."""
    rates: Tensor
    steps: tuple[InnerStep, ...]

    def first(self, k: int) -> InnerTrajectory:
        """Return the path of the first ``k`` steps."""
        return (
            self
            if k >= len(self.steps)
            else InnerTrajectory(self.steps[k].start, self.rates, self.steps[:k])
        )

    def vjp(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Carry an outer objective's slopes ``(task, P)`` at the end back: by the first weights,
        and by the rates.
        """
        by_rates = torch.zeros_like(slope)
        for step in reversed(self.steps):
            by_rates = by_rates + step.gradient * slope
            slope = slope + step.hessian(self.rates * slope)
        return slope, by_rates

    def jvp(self, move: Tensor, faster: Tensor) -> Tensor:
        """Say how the end moves, ``(task, P)``, as the first weights move by ``move`` and the rates
        by ``faster``.
        """
        for step in self.steps:
            move = move + self.rates * step.hessian(move) + faster * step.gradient
        return move


def adapt_weights(
    objective: Objective,
    weights: Tensor,
    rates: Tensor,
    data: Sequence[Any],
    derivative: Derivative = exact_derivatives,
) -> InnerTrajectory:
    """Take one step on each of ``data`` from ``weights`` ``(task, P)``; ``rates`` are ``()`` or
    ``(P,)``.
    """
    steps = []
    for batch in data:
        gradient, hessian = derivative(objective, weights, batch)
        steps.append(InnerStep(weights, gradient, hessian))
        weights = weights + rates * gradient
    return InnerTrajectory(weights, rates, tuple(steps))
