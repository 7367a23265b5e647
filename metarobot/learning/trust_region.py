"""Trust-region policy optimisation: natural gradient, KL-bounded step and line search.

Schulman et al. 2015, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve ``A x = b`` for a symmetric positive definite matrix known by its products.

    All vectors are ``(P,)``. Stops early where the residual vanishes, or where a direction shows
    that the matrix is not positive definite.
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = residual.clone()
    squared_residual = residual @ residual
    for _ in range(iterations):
        if squared_residual <= 1e-10 * (b @ b):
            break

        a_direction = product(direction)
        curvature = direction @ a_direction
        if not curvature > 0:  # written so that NaN stops too
            break

        # α = rᵀr / pᵀAp,   x += α p,   r −= α A p
        step_size = squared_residual / curvature
        x = x + step_size * direction
        residual = residual - step_size * a_direction

        # β = r'ᵀr' / rᵀr,   p = r' + β p
        previous = squared_residual
        squared_residual = residual @ residual
        direction = residual + squared_residual / previous * direction
    return x


def scale_to_kl_bound(
    direction: Tensor, product: Callable[[Tensor], Tensor], bound: float
) -> Tensor:
    """Scale a direction ``(P,)`` to the bound on the KL divergence, to second order.

    ``product`` multiplies by the Fisher matrix F. Returns zeros where xᵀF x is not positive.
    """
    # ½ (βx)ᵀ F (βx) = δ   =>   β = √(2δ / xᵀF x)
    curvature = direction @ product(direction)
    if not curvature > 0:
        return torch.zeros_like(direction)
    return direction * torch.sqrt(2 * bound / curvature)


class LineSearchResult(NamedTuple):
    """Outcome of a line search."""

    gain: float
    """By how much the objective rose."""
    divergence: float
    """KL divergence of the accepted step."""
    success: bool
    """Whether any step was accepted."""
    tries: int
    """Steps that were evaluated."""


def backtracking_line_search(
    step: Tensor,
    objective: Callable[[Tensor], tuple[float, float]],
    bound: float,
    shrink: float,
    tries: int,
) -> tuple[Tensor, LineSearchResult]:
    """Shrink a step until it raises the objective and keeps the bound on the divergence.

    Args:
        step: Longest step, ``(P,)``.
        objective: Step -> (value to increase, divergence).
        bound: Largest divergence that is accepted.
        shrink: Factor between one try and the next.
        tries: Most steps to evaluate.

    Returns:
        The accepted step, or zeros if none was, and how the search went.
    """
    max_tries = tries if bool(step.any()) else 0
    start_value, _ = objective(torch.zeros_like(step))

    for i in range(max_tries):
        value, divergence = objective(step)
        # comparisons with NaN are false, so a step that breaks the numbers is never accepted
        if value > start_value and divergence <= bound:
            return step, LineSearchResult(value - start_value, divergence, True, i + 1)
        step = step * shrink
    return torch.zeros_like(step), LineSearchResult(0.0, 0.0, False, max_tries)
