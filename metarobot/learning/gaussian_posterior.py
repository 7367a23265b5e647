"""Diagonal Gaussians over tasks, for agents that infer a posterior."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from metarobot.errors import MetarobotError

MIN_MEAN_SPREAD = 1e-3
"""Standard deviation of the means between tasks, in standard deviations of the posteriors, below
which a dimension does not tell tasks apart."""


class PosteriorError(MetarobotError):
    """A posterior that has broken down, so that training on would only make it worse."""


class Gaussian(NamedTuple):
    """Independent normal distributions: mean and variance, ``(..., latent)`` each."""

    mean: Tensor
    var: Tensor


def standard_normal(like: Tensor) -> Gaussian:
    """Return the prior over tasks, N(0, 1) in every dimension, of the shape of ``like``."""
    return Gaussian(like.new_zeros(like.shape), like.new_ones(like.shape))


def sample(g: Gaussian, noise: Tensor) -> Tensor:
    """Map standard normal ``noise`` ``(..., latent)`` to a sample of ``g``, differentiably."""
    # x = μ + σ ε
    return g.mean + g.var.sqrt() * noise


def kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """Return the Kullback-Leibler divergence KL(p ‖ q) in nats, summed over the last axis."""
    # KL = ½ Σ [σ²_p / σ²_q − ln(σ²_p / σ²_q) + (μ_p − μ_q)² / σ²_q − 1]
    ratio = p.var / q.var
    return 0.5 * (ratio - ratio.log() + (p.mean - q.mean).square() / q.var - 1.0).sum(-1)


def product_of_gaussians(g: Gaussian, dim: int) -> Gaussian:
    """Multiply the Gaussians along an axis into one (PEARL, Rakelly et al. 2019).

    The result does not depend on their order.
    """
    # 1/σ² = Σ 1/σ²_i,   μ = σ² Σ μ_i / σ²_i
    precision = g.var.reciprocal()
    var = precision.sum(dim).reciprocal()
    return Gaussian(var * (precision * g.mean).sum(dim), var)


def log_density(g: Gaussian, x: Tensor) -> Tensor:
    """Return the log-density of ``x`` ``(..., latent)``, summed over the last axis."""
    # ln N(x; μ, σ²) = −½ Σ [(x − μ)² / σ² + ln σ² + ln 2π]
    return -0.5 * ((x - g.mean).square() / g.var + g.var.log() + math.log(2 * math.pi)).sum(-1)


def check_posterior(g: Gaussian, name: str) -> None:
    """Check that posteriors ``(task, latent)`` are finite and differ between tasks.

    Args:
        g: The posteriors, one per task.
        name: The agent's name, for the message.

    Raises:
        PosteriorError: They are not finite, or the same in all tasks.
    """
    finite = g.mean.isfinite().all() and g.var.isfinite().all() and (g.var > 0).all()
    if not bool(finite):
        raise PosteriorError(
            f"{name}: the posterior is not finite any more; take a lower learning rate"
        )
    mean_spread = g.mean.std(0, correction=0) / g.var.mean(0).sqrt()
    if len(g.mean) > 1 and not bool((mean_spread > MIN_MEAN_SPREAD).any()):
        raise PosteriorError(
            f"{name}: the posterior has collapsed, it is the same in all {len(g.mean)} tasks"
        )
