"""Optimisers and modules as flat named tensors, for checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def flatten_state(optimiser: torch.optim.Optimizer, **modules: nn.Module) -> dict[str, Tensor]:
    """Flatten modules and an Adam optimiser's moments into named tensors, copies of what they hold
    now.
    """
    flat = {
        f"{name}.{k}": v.detach().clone()
        for name, m in modules.items()
        for k, v in m.state_dict().items()
    }
    for i, moments in optimiser.state_dict()["state"].items():
        flat |= {f"optimiser.{i}.{k}": v.clone() for k, v in moments.items()}
    return flat


def restore_state(
    flat: dict[str, Tensor], optimiser: torch.optim.Optimizer, **modules: nn.Module
) -> None:
    """Restore exactly what ``pack`` flattened."""
    for name, m in modules.items():
        m.load_state_dict(
            {k.removeprefix(f"{name}."): v for k, v in flat.items() if k.startswith(f"{name}.")}
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        if key.startswith("optimiser."):
            _, i, k = key.split(".")
            moments.setdefault(int(i), {})[k] = value.clone()
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})


def move_to_device(learner: Any, device: str) -> None:
    """Put all modules that a learner holds on a device, those of critics and learners within it
    too.

    Before ``load``: an optimiser's moments go where the weights are.
    """
    for held in vars(learner).values():
        if isinstance(held, nn.Module):
            held.to(device)
        elif hasattr(held, "load") and hasattr(held, "state"):
            move_to_device(held, device)
