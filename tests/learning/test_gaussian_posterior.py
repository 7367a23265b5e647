import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from metarobot.learning.gaussian_posterior import (
    Gaussian,
    PosteriorError,
    check_posterior,
    kl_divergence,
    log_density,
    product_of_gaussians,
    sample,
    standard_normal,
)


def gaussian(*shape: int, seed: int = 0) -> Gaussian:
    rng = torch.Generator().manual_seed(seed)
    mean, log_var = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    return Gaussian(mean, log_var.exp())


def torchs(g: Gaussian) -> Normal:
    return Normal(g.mean, g.var.sqrt())


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_divergence_and_density_are_torchs(seed: int, latent: int) -> None:
    p, q = gaussian(3, latent, seed=seed), gaussian(3, latent, seed=seed + 1)
    assert torch.allclose(kl_divergence(p, q), torch_kl(torchs(p), torchs(q)).sum(-1))
    assert torch.equal(kl_divergence(p, p), torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(log_density(p, q.mean), torchs(p).log_prob(q.mean).sum(-1))


def test_divergence_equals_its_estimate_from_samples() -> None:
    p, q = gaussian(2, 3), gaussian(2, 3, seed=1)
    rng = torch.Generator().manual_seed(2)
    x = sample(p, torch.randn(200_000, 2, 3, generator=rng, dtype=torch.float64))
    assert torch.allclose(x.mean(0), p.mean, atol=0.02)
    assert torch.allclose(x.var(0), p.var, rtol=0.02)
    assert torch.allclose(
        (log_density(p, x) - log_density(q, x)).mean(0), kl_divergence(p, q), rtol=0.02
    )


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_a_product_is_the_density_that_is_proportional_to_its_factors(
    seed: int, factors: int
) -> None:
    g = gaussian(2, factors, 3, seed=seed)
    whole = product_of_gaussians(g, 1)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None].expand(9, 2, 3)
    joint = sum(
        (torchs(Gaussian(g.mean[:, i], g.var[:, i])).log_prob(x) for i in range(factors)),
        start=torch.zeros(()),
    )
    gap = joint - torchs(whole).log_prob(x)
    assert torch.allclose(gap, gap[:1].expand_as(gap), atol=1e-9)


def test_a_product_knows_no_order_and_is_the_closed_form_of_two() -> None:
    g = gaussian(7, 3)
    shuffled = product_of_gaussians(Gaussian(g.mean.flip(0), g.var.flip(0)), 0)
    assert all(
        torch.allclose(a, b) for a, b in zip(product_of_gaussians(g, 0), shuffled, strict=True)
    )
    two = product_of_gaussians(
        Gaussian(torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [2.0]])), 0
    )
    assert (float(two.mean), float(two.var)) == (pytest.approx(1.0), pytest.approx(2 / 3))


def test_the_prior_is_the_standard_normal() -> None:
    prior = standard_normal(torch.empty(2, 3))
    assert float(log_density(prior, torch.zeros(2, 3))[0]) == pytest.approx(
        -1.5 * math.log(2 * math.pi)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["mean", "var"])
def test_a_posterior_that_is_not_finite_is_named(part: str, value: float) -> None:
    g = gaussian(4, 2)
    getattr(g, part)[1, 0] = value
    with pytest.raises(PosteriorError, match="pearl: the posterior is not finite any more"):
        check_posterior(g, "pearl")


@pytest.mark.parametrize("mean", [torch.zeros(4, 2), torch.tensor([1.0, -2.0]).expand(4, 2)])
def test_a_posterior_that_is_the_same_in_all_tasks_has_collapsed(mean: Tensor) -> None:
    with pytest.raises(
        PosteriorError, match="varibad: the posterior has collapsed, it is the same in all 4 tasks"
    ):
        check_posterior(Gaussian(mean, torch.ones(4, 2)), "varibad")


def test_one_dimension_that_tells_tasks_apart_is_enough_and_one_task_cannot_collapse() -> None:
    apart = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    check_posterior(Gaussian(apart, torch.ones(2, 2)), "varibad")
    check_posterior(Gaussian(apart[:1], torch.ones(1, 2)), "varibad")
    with pytest.raises(PosteriorError, match="not finite"):
        check_posterior(Gaussian(apart, torch.zeros(2, 2)), "varibad")
