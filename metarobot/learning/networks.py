"""Building blocks of networks: running normalisation, perceptrons, Gaussian log-density."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError


class RunningNorm(nn.Module):
    """Normalise features by their running mean and standard deviation.

    The statistics are buffers, so checkpoints and exported policies carry them. Batches are merged
    by Chan et al. (1979), accumulated in float64 and applied in float32. Outputs are clipped to
    ±``limit``.
    """

    count: Tensor
    """Number of samples so far."""
    mean: Tensor
    m2: Tensor
    """Sum of squared deviations from the mean."""
    shift: Tensor
    """The mean, in float32."""
    scale: Tensor
    """One over the standard deviation, in float32."""

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
        """Merge samples ``(sample, feature)`` into the statistics."""
        x = x.double()
        samples = len(x)
        mean = x.mean(0)
        total = self.count + samples
        delta = mean - self.mean

        # M2 = M2_a + M2_b + δ² n_a n_b / n,   μ = μ_a + δ n_b / n   (Chan et al. 1979)
        batch_m2 = (x - mean).square().sum(0)
        self.m2 += batch_m2 + delta.square() * self.count * samples / total
        self.mean += delta * samples / total
        self.count.fill_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.m2 / self.count).clamp_min(1e-8).rsqrt())

    @torch.no_grad()
    def copy_from(self, other: RunningNorm) -> None:
        """Copy the statistics of the first features; the rest start with mean 0 and deviation 1."""
        features = len(other.mean)
        self.count.copy_(other.count)
        # a sum of squares equal to the count is a deviation of 1
        self.m2.copy_(other.count)
        self.mean[:features] = other.mean
        self.m2[:features] = other.m2
        self.shift.copy_(self.mean)
        self.scale.copy_((self.m2 / self.count.clamp_min(1)).clamp_min(1e-8).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., feature)``."""
        return ((x - self.shift) * self.scale).clamp(-self.limit, self.limit)


def normalise_leading(norm: RunningNorm, x: Tensor) -> Tensor:
    """Normalise the first features of ``x`` ``(..., feature)``, as many as ``norm`` has."""
    features = norm.mean.shape[0]
    return torch.cat([norm(x[..., :features]), x[..., features:]], -1)


def mlp(
    inputs: int,
    hidden: tuple[int, ...],
    outputs: int,
    gain: float = 1.0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    """Build a perceptron with orthogonal weights and zero biases.

    Args:
        inputs: Number of inputs.
        hidden: Width of each hidden layer.
        outputs: Number of outputs.
        gain: Gain of the last layer's weights; hidden layers have √2.
        activation: Makes the activation after each hidden layer.
    """
    sizes = (inputs, *hidden, outputs)
    last = len(sizes) - 2
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layer = nn.Linear(fan_in, fan_out)
        layers.append(orthogonal(layer, gain if i == last else math.sqrt(2)))
        if i != last:
            layers.append(activation())
    return nn.Sequential(*layers)


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    """Set orthogonal weights of the given gain and a zero bias; return the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def linears(net: nn.Sequential) -> list[nn.Linear]:
    """Return the linear layers of a perceptron, in order."""
    return [layer for layer in net if isinstance(layer, nn.Linear)]


@torch.no_grad()
def copy_into_larger(layer: nn.Linear, other: nn.Linear) -> None:
    """Make the first outputs of a layer equal to those of a smaller one.

    Inputs that the smaller layer does not have get zero weights to these outputs.

    Raises:
        MetarobotError: ``other`` has more inputs or outputs than ``layer``.
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


def log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Return the log-density of ``action`` under a diagonal Gaussian, summed over actuators.

    ``mean`` and ``action`` are ``(..., act)``, ``log_std`` is ``(act,)``; the result is ``(...,)``.
    """
    # ln π(a|s) = −½ Σ ((a − μ) / σ)² − Σ ln σ − ½ n ln 2π
    z = (action - mean) * torch.exp(-log_std)
    normaliser = 0.5 * math.log(2 * math.pi) * action.shape[-1]
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - normaliser
