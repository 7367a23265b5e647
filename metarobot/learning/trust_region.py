"""Trust-region steps: the natural gradient, and how far along it one may go (Schulman et al.
2015).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve ``A x = b`` for a symmetric positive matrix known by its products; all vectors
    ``(P,)``.

    Stops early where the residual vanishes or the matrix turns out not to be positive.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(iterations):
        if rr <= 1e-10 * (b @ b):
            break
        ap = product(p)
        curvature = p @ ap
        if not curvature > 0:
            break
        x = x + rr / curvature * p
        r = r - rr / curvature * ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def scale_to_kl_bound(
    direction: Tensor, product: Callable[[Tensor], Tensor], bound: float
) -> Tensor:
    """Scale a direction so that ``½ xᵀ A x``, the KL divergence to second order, is ``bound``; zero
    if it cannot be.
    """
    curvature = direction @ product(direction)
    if not curvature > 0:
        return torch.zeros_like(direction)
    return direction * torch.sqrt(2 * bound / curvature)


class LineSearchResult(NamedTuple):
    """What a line search came to."""

    gain: float
    divergence: float
    success: bool
    tries: int


def backtracking_line_search(
    step: Tensor,
    objective: Callable[[Tensor], tuple[float, float]],
    bound: float,
    shrink: float,
    tries: int,
) -> tuple[Tensor, LineSearchResult]:
    """Shrink a step until the objective gains by it and the divergence keeps its bound.

    ``objective`` returns both, of a step. If no step will do, zeros come back: nothing moves.
    """
    tries = tries if bool(step.any()) else 0
    before, _ = objective(torch.zeros_like(step))
    for i in range(tries):
        after, divergence = objective(step)
        if after > before and divergence <= bound:
            return step, LineSearchResult(after - before, divergence, True, i + 1)
        step = step * shrink
    return torch.zeros_like(step), LineSearchResult(0.0, 0.0, False, tries)
