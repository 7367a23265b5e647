"""Networks: normalisers, perceptrons, and three memories under one interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError


class RunningNorm(nn.Module):
    """Normalise features by their running mean and deviation; buffers, so checkpoints and exports
    carry them.

    Merges batches by Chan et al. (1979). Accumulates in float64, applies in float32, clips to
    ±``limit``.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, features: int, limit: float = 10.0) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in samples ``(sample, feature)``."""
        x = x.double()
        n, mean = len(x), x.mean(0)
        total, gap = self.count + n, mean - self.mean
        self.m2 += (x - mean).square().sum(0) + gap.square() * self.count * n / total
        self.mean += gap * n / total
        self.count.fill_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.m2 / self.count).clamp_min(1e-8).rsqrt())

    @torch.no_grad()
    def copy_from(self, other: RunningNorm) -> None:
        """Take over what another has seen of the first features; the rest begin with mean 0 and
        deviation 1.
        """
        n = len(other.mean)
        self.count.copy_(other.count)
        self.m2.copy_(other.count)
        for mine, theirs in ((self.mean, other.mean), (self.m2, other.m2)):
            mine[:n] = theirs
        self.shift.copy_(self.mean)
        self.scale.copy_((self.m2 / self.count.clamp_min(1)).clamp_min(1e-8).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., feature)``."""
        return ((x - self.shift) * self.scale).clamp(-self.limit, self.limit)


def mlp(
    inputs: int,
    hidden: tuple[int, ...],
    outputs: int,
    gain: float = 1.0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    """Build a perceptron with orthogonal weights and zero biases; ``gain`` scales the last
    layer.
    """
    sizes = (inputs, *hidden, outputs)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        layers.append(orthogonal(nn.Linear(a, b), gain if last else math.sqrt(2)))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    """Set orthogonal weights of the given gain and a zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def linears(net: nn.Sequential) -> list[nn.Linear]:
    """List the linear layers of a perceptron."""
    return [layer for layer in net if isinstance(layer, nn.Linear)]


@torch.no_grad()
def copy_into_larger(layer: nn.Linear, other: nn.Linear) -> None:
    """Make a layer's first outputs those of a smaller one; inputs that the smaller one lacks are
    silent there.
    """
    rows, columns = other.weight.shape
    if rows > layer.weight.shape[0] or columns > layer.weight.shape[1]:
        raise MetarobotError(
            f"a layer of {rows} x {columns} weights does not fit one of {tuple(layer.weight.shape)}"
        )
    layer.weight[:rows] = 0.0
    layer.weight[:rows, :columns] = other.weight
    if layer.bias is not None:
        layer.bias[:rows] = other.bias


def distillation_loss(mean: Tensor, teacher_action: Tensor) -> Tensor:
    """Squared error of the mean action to what is record_teacher, where anything is, meaned over
    the action axis.
    """
    return (
        torch.where(teacher_action.isnan(), 0.0, mean - teacher_action.nan_to_num())
        .square()
        .mean(-1)
    )


def log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density of ``action`` under a diagonal Gaussian, summed over the action axis."""
    z = (action - mean) * torch.exp(-log_std)
    return (
        -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]
    )
