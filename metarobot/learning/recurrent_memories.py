"""Recurrent memories under one interface: step by step to act, over whole sequences to learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.linear_recurrence import linear_scan
from metarobot.learning.networks import orthogonal

MemoryState = tuple[Tensor, ...]
"""The state of a memory: tensors ``(world, width)``."""


class Memory(Protocol):
    """A recurrent layer: the same function step by step (acting) and over sequences (learning)."""

    def begin(self, worlds: int) -> MemoryState:
        """Return the empty memory of each world, tensors ``(world, width)``."""

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Process inputs ``(world, input)``; return outputs ``(world, width)`` and the state."""

    def sequence(self, x: Tensor) -> Tensor:
        """Process ``(time, world, input)`` from empty memory; return ``(time, world, width)``."""


class LinearRecurrence(nn.Module):
    """A gated linear recurrence that trains in parallel over time (minGRU, Feng et al. 2024).

    ``h_t = (1 − z_t) h_{t−1} + z_t c_t``, where gate z and candidate c depend on the input alone,
    so that one matrix product serves all time steps. The biases of the gates are spaced evenly from
    −6 to 0: the untrained memory has time scales from two steps to hundreds.
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
        """Process one input."""
        gate, candidate = self.project(x).chunk(2, -1)
        # h_t = (1 − z_t) h_{t−1} + z_t c_t
        h = torch.lerp(state[0], torch.tanh(candidate), torch.sigmoid(gate))
        return h, (h,)

    def sequence(self, x: Tensor) -> Tensor:
        """Process all inputs at once."""
        gate, candidate = self.project(x).chunk(2, -1)
        z = torch.sigmoid(gate)
        h: Tensor = linear_scan(1.0 - z, z * torch.tanh(candidate))
        return h


class TorchRecurrence(nn.Module):
    """``nn.GRU`` or ``nn.LSTM`` under the memory interface."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell: Any = kind(inputs, width)
        self.is_lstm = kind is nn.LSTM
        for name, parameter in self.cell.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)

    def begin(self, worlds: int) -> MemoryState:
        """Return zeros ``(world, width)``: h, and for an LSTM also c."""
        weight = self.cell.weight_hh_l0
        h = weight.new_zeros(worlds, self.width)
        return (h, weight.new_zeros(worlds, self.width)) if self.is_lstm else (h,)

    def step(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Process one input."""
        # torch's layers want a leading time axis for inputs and a layer axis for states
        states = tuple(tensor[None] for tensor in state)
        if self.is_lstm:
            output, new_states = self.cell(x[None], states)
        else:
            output, h = self.cell(x[None], states[0])
            new_states = (h,)
        return output[0], tuple(tensor[0] for tensor in new_states)

    def sequence(self, x: Tensor) -> Tensor:
        """Process all inputs, one after the other."""
        h: Tensor = self.cell(x)[0]
        return h


MEMORIES: dict[str, Callable[[int, int], Any]] = {
    "linear": LinearRecurrence,
    "gru": lambda inputs, width: TorchRecurrence(nn.GRU, inputs, width),
    "lstm": lambda inputs, width: TorchRecurrence(nn.LSTM, inputs, width),
}
"""Name -> (inputs, width) -> memory."""


def make_memory(kind: str, inputs: int, width: int) -> Any:
    """Build the memory called ``kind``: an ``nn.Module`` that satisfies ``Memory``.

    Raises:
        MetarobotError: There is no memory of that name.
    """
    if kind not in MEMORIES:
        raise MetarobotError(f"no memory called {kind!r}; there are: {', '.join(MEMORIES)}")
    return MEMORIES[kind](inputs, width)
