"""Diagonal Gaussians over tasks: what agents with a posterior share."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from metarobot.errors import MetarobotError

FLAT = 1e-3
"""Spread of the means between tasks, in standard deviations of the posteriors, below which none
tells tasks apart."""


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
    """Move standard normal ``noise`` ``(..., latent)`` to ``g``, differentiably."""
    return g.mean + g.var.sqrt() * noise


def kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """Kullback-Leibler divergence KL(p ‖ q), summed over the last axis, in nats."""
    # KL = ½ Σ [ln(σ²_q / σ²_p) + (σ²_p + (μ_p − μ_q)²) / σ²_q − 1]
    ratio = p.var / q.var
    return 0.5 * (ratio - ratio.log() + (p.mean - q.mean).square() / q.var - 1.0).sum(-1)


def product_of_gaussians(g: Gaussian, dim: int) -> Gaussian:
    """Multiply the Gaussians along an axis into one, in whatever order they stand (PEARL, Rakelly
    et al. 2019).
    """
    # 1/σ² = Σ 1/σ²_i,   μ = σ² Σ μ_i / σ²_i
    precision = g.var.reciprocal()
    var = precision.sum(dim).reciprocal()
    return Gaussian(var * (precision * g.mean).sum(dim), var)


def log_density(g: Gaussian, x: Tensor) -> Tensor:
    """Log-density of ``x`` ``(..., latent)``, summed over the last axis."""
    return -0.5 * ((x - g.mean).square() / g.var + g.var.log() + math.log(2 * math.pi)).sum(-1)


def check_posterior(g: Gaussian, name: str) -> None:
    """Raise for posteriors ``(task, latent)`` that are not finite, or the same in all tasks."""
    if not bool(g.mean.isfinite().all() and g.var.isfinite().all() and (g.var > 0).all()):
        raise PosteriorError(
            f"{name}: the posterior is not finite any more; take a lower learning rate"
        )
    spread = g.mean.std(0, correction=0) / g.var.mean(0).sqrt()
    if len(g.mean) > 1 and not bool((spread > FLAT).any()):
        raise PosteriorError(
            f"{name}: the posterior has collapsed, it is the same in all {len(g.mean)} tasks"
        )
