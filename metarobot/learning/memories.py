"""Recurrent memories under one interface: step by step while acting, over whole sequences while
learning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.linear_recurrence import linear_scan
from metarobot.learning.networks import orthogonal

MemoryState = tuple[Tensor, ...]


class Memory(Protocol):
    """A recurrent layer: the same function step by step (acting) and over a whole sequence
    (learning).
    """

    def begin(self, worlds: int) -> MemoryState:
        """Return the empty memory of each world, tensors ``(world, ...)``."""

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Take one input ``(world, input)``; return the output ``(world, width)`` and the new
        state.
        """

    def sequence(self, x: Tensor) -> Tensor:
        """Run over ``(time, world, input)`` from the empty memory; return ``(time, world,
        width)``.
        """


class LinearRecurrence(nn.Module):
    """A gated linear recurrence that trains in parallel over time (minGRU, Feng et al. 2024).

    ``h_t = (1 − z_t) h_{t−1} + z_t c_t`` with gate z and candidate c from the input alone, so one
    matrix product serves all time steps. Gate biases spread from −6 to 0, so that time scales from
    two steps to hundreds are there at birth.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = orthogonal(nn.Linear(inputs, 2 * width), 1.0)
        with torch.no_grad():
            self.project.bias[:width] = torch.linspace(-6.0, 0.0, width)

    def begin(self, worlds: int) -> MemoryState:
        """Return zeros ``(world, width)``."""
        return (self.project.weight.new_zeros(worlds, self.width),)

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Advance by one input."""
        gate, candidate = self.project(x).chunk(2, -1)
        h = torch.lerp(state[0], torch.tanh(candidate), torch.sigmoid(gate))
        return h, (h,)

    def sequence(self, x: Tensor) -> Tensor:
        """Advance by all inputs at once."""
        gate, candidate = self.project(x).chunk(2, -1)
        z = torch.sigmoid(gate)
        h: Tensor = linear_scan(1.0 - z, z * torch.tanh(candidate))
        return h


class Gated(nn.Module):
    """``nn.GRU`` or ``nn.LSTM`` under the memory interface."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell: Any = kind(inputs, width)
        self.tensors = 2 if kind is nn.LSTM else 1
        for name, p in self.cell.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)

    def begin(self, worlds: int) -> MemoryState:
        """Return zeros ``(world, width)``, twice for an LSTM."""
        return tuple(
            self.cell.weight_hh_l0.new_zeros(worlds, self.width) for _ in range(self.tensors)
        )

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Advance by one input."""
        packed = tuple(s[None] for s in state)
        h, after = self.cell(x[None], packed if self.tensors == 2 else packed[0])
        return h[0], tuple(s[0] for s in (after if self.tensors == 2 else (after,)))

    def sequence(self, x: Tensor) -> Tensor:
        """Advance by all inputs, one after the other."""
        h: Tensor = self.cell(x)[0]
        return h


MEMORIES: dict[str, Callable[[int, int], Any]] = {
    "linear": LinearRecurrence,
    "gru": lambda inputs, width: Gated(nn.GRU, inputs, width),
    "lstm": lambda inputs, width: Gated(nn.LSTM, inputs, width),
}


def make_memory(kind: str, inputs: int, width: int) -> Any:
    """Build the memory called ``kind``."""
    if kind not in MEMORIES:
        raise MetarobotError(f"no memory called {kind!r}; there are: {', '.join(MEMORIES)}")
    return MEMORIES[kind](inputs, width)
