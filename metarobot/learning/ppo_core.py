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


def run_epochs(passes: Iterable[Iterable[GradientStep]], watched: int, limit: float) -> tuple[Tensor, int]:
    """Take the steps of each pass until the statistic ``watched`` exceeds a limit; return sums and number of steps.

    On the CPU each step is looked at. On an accelerator a look waits for all that was asked of it, so there is one a
    pass, at the pass's largest: it ends with the pass.
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
