"""What every PPO here shares (Schulman et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

GradientStep = Callable[[], Tensor]
"""Takes a gradient step and returns its statistics ``(statistic,)``."""


def set_gradients(loss: Tensor, statistics: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Set each parameter's gradient of ``loss`` and return the statistics, detached."""
    wanted = list(parameters)
    for p, slope in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
        p.grad = slope
    return statistics.detach()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's clipped objective of each step, to be maximised (Schulman et al. 2017, eq. 7).

    ``ratio`` is π(a|s) / π_old(a|s); all tensors have the same shape.
    """
    # L = min(r A, clip(r, 1 − ε, 1 + ε) A)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def decayed(start: float, end_fraction: float, progress: float) -> float:
    """Return a value that falls linearly from ``start`` to ``end_fraction`` of it over training."""
    return start * (1.0 - progress * (1.0 - end_fraction))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups of an optimiser one learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def run_epochs(
    passes: Iterable[Iterable[GradientStep]], watched: int, limit: float
) -> tuple[Tensor, int]:
    """Take the steps of each pass until the statistic ``watched`` exceeds a limit; return sums and
    number of steps.

    On the CPU each step is looked at. On an accelerator a look waits for all that was asked of it,
    so there is one a pass, at the pass's largest: it ends with the pass.
    """
    sums, taken = torch.zeros(()), 0
    for steps in passes:
        seen = []
        for step in steps:
            said = step()
            sums, taken = said if taken == 0 else sums + said, taken + 1
            seen.append(said[watched])
            if said.device.type == "cpu" and float(said[watched]) > limit:
                return sums, taken
        if float(torch.stack(seen).amax()) > limit:
            break
    return sums, taken
