"""Optimisers and modules as flat named tensors, for checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metarobot.learning.agent_interface import Stateful


def flatten_state(optimiser: torch.optim.Optimizer, **modules: nn.Module) -> dict[str, Tensor]:
    """Return copies of modules and of an Adam optimiser's moments as flat named tensors.

    Names are ``<module>.<parameter or buffer>`` and ``optimiser.<index>.<moment>``.
    """
    flat = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            flat[f"{name}.{key}"] = value.detach().clone()
    for index, moments in optimiser.state_dict()["state"].items():
        for key, value in moments.items():
            flat[f"optimiser.{index}.{key}"] = value.clone()
    return flat


def restore_state(
    flat: dict[str, Tensor], optimiser: torch.optim.Optimizer, **modules: nn.Module
) -> None:
    """Restore modules and optimiser from what ``flatten_state`` returned."""
    for name, module in modules.items():
        module.load_state_dict(with_prefix(flat, f"{name}."))

    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in with_prefix(flat, "optimiser.").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = value.clone()
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})


def with_prefix(flat: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix``, named without it."""
    return {
        name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)
    }


def move_to_device(learner: Any, device: str) -> None:
    """Move all modules that a learner holds to a device, those of critics and learners in it too.

    Call it before ``load``: an optimiser's moments go where the weights are.
    """
    for held in vars(learner).values():
        if isinstance(held, nn.Module):
            held.to(device)
        elif isinstance(held, Stateful):
            move_to_device(held, device)
