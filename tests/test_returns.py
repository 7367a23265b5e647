import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobot.returns import discounted, explained_variance, gae


def gae_by_definition(reward, value, next_value, terminated, cut, gamma: float, lam: float) -> torch.Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, up to and including the first step at which the trace ends."""
    time, worlds = reward.shape
    out = torch.zeros_like(reward)
    for w in range(worlds):
        for t in range(time):
            for k in range(time - t):
                s = t + k
                following = 0.0 if terminated[s, w] else gamma * next_value[s, w]
                out[t, w] += (gamma * lam) ** k * (reward[s, w] + following - value[s, w])
                if terminated[s, w] or cut[s, w]:
                    break
    return out


@given(st.integers(1, 15), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 0.2, 0.9]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_gae_equals_its_definition(time: int, gamma: float, lam: float, ends: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, time, 3, generator=rng, dtype=torch.float64)
    terminated, cut = torch.rand(2, time, 3, generator=rng) < ends
    args = (reward, value, next_value, terminated, cut, gamma, lam)
    assert torch.allclose(gae(*args), gae_by_definition(*args), atol=1e-12)


ONE = torch.ones(1, 1)
YES, NO = torch.tensor([[True]]), torch.tensor([[False]])


def test_a_time_limit_bootstraps_and_a_fall_does_not() -> None:
    assert gae(ONE, ONE, 10 * ONE, NO, YES, 0.5, 0.9).item() == 1 + 0.5 * 10 - 1
    assert gae(ONE, ONE, 10 * ONE, YES, NO, 0.5, 0.9).item() == 0.0
    assert gae(ONE, ONE, 10 * ONE, YES, YES, 0.5, 0.9).item() == 0.0


def test_nothing_leaks_back_over_the_end_of_an_episode() -> None:
    reward = torch.tensor([[0.0], [0.0], [100.0]])
    zeros, no = torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.bool)
    end = torch.tensor([[False], [True], [False]])
    assert gae(reward, zeros, zeros, no, no, 1.0, 1.0)[:, 0].tolist() == [100, 100, 100]
    assert gae(reward, zeros, zeros, end, no, 1.0, 1.0)[:, 0].tolist() == [0, 0, 100]
    assert gae(reward, zeros, zeros, no, end, 1.0, 1.0)[:, 0].tolist() == [0, 0, 100]


def test_with_lambda_one_the_advantage_is_the_return_above_the_value() -> None:
    rng = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 8, 4, generator=rng, dtype=torch.float64)
    end = torch.zeros(8, 4, dtype=torch.bool)
    end[-1] = True
    following = torch.cat([value[1:], value[:1]])
    to_go = torch.stack([(0.9 ** torch.arange(8 - t, dtype=torch.float64) @ reward[t:]) for t in range(8)])
    assert torch.allclose(gae(reward, value, following, end, end, 0.9, 1.0), to_go - value)


@given(st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_discounted_equals_the_direct_sum(time: int, gamma: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    reward, start = torch.randn(time, 2, generator=rng).double(), torch.randn(2, generator=rng).double()
    for given_start in (None, start):
        first = torch.zeros(2).double() if given_start is None else given_start
        for t, total in enumerate(discounted(reward, gamma, given_start)):
            direct = sum(gamma ** (t - s) * reward[s] for s in range(t + 1)) + gamma ** (t + 1) * first
            assert torch.allclose(total, direct, atol=1e-12)


def test_discounted_goes_on_where_it_stopped() -> None:
    reward = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    whole = discounted(reward, 0.9)
    assert torch.equal(discounted(reward[4:], 0.9, whole[3]), whole[4:])


def test_explained_variance_of_the_perfect_the_mean_and_the_harmful_critic() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.full((4,), 2.5), target) == 0.0
    assert explained_variance(target / 2, target) == pytest.approx(0.75)
    assert explained_variance(-target, target) == pytest.approx(-3.0)
    assert torch.isfinite(explained_variance(target, torch.ones(4)))
