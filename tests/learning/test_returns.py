import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobot.learning.returns import discounted, explained_variance, gae, linear_baseline


def gae_by_definition(
    reward, value, next_value, terminated, cut, gamma: float, lam: float
) -> torch.Tensor:
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


@given(
    st.integers(1, 15),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_gae_equals_its_definition(
    time: int, gamma: float, lam: float, ends: float, seed: int
) -> None:
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
    to_go = torch.stack(
        [(0.9 ** torch.arange(8 - t, dtype=torch.float64) @ reward[t:]) for t in range(8)]
    )
    assert torch.allclose(gae(reward, value, following, end, end, 0.9, 1.0), to_go - value)


@given(st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_discounted_equals_the_direct_sum(time: int, gamma: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    reward, start = (
        torch.randn(time, 2, generator=rng).double(),
        torch.randn(2, generator=rng).double(),
    )
    for given_start in (None, start):
        first = torch.zeros(2).double() if given_start is None else given_start
        for t, total in enumerate(discounted(reward, gamma, given_start)):
            direct = (
                sum(gamma ** (t - s) * reward[s] for s in range(t + 1)) + gamma ** (t + 1) * first
            )
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


def features(x: torch.Tensor) -> np.ndarray:
    """What returns are fitted by, ``(time, world, feature)``."""
    t = np.broadcast_to((np.arange(len(x)) / 100)[:, None, None], (*x.shape[:2], 1))
    return np.concatenate([x.numpy(), x.numpy() ** 2, t, t**2, t**3, np.ones_like(t)], -1)


def rollouts(
    time: int, worlds: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observations, returns-to-go and the valid mask: the first few steps of each world."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(time, worlds, 3, generator=rng, dtype=torch.float64)
    to_go = torch.randn(time, worlds, generator=rng, dtype=torch.float64)
    return (
        x,
        to_go,
        torch.arange(time)[:, None] < torch.randint(1, time + 1, (worlds,), generator=rng),
    )


@given(
    st.integers(1, 15),
    st.integers(1, 3),
    st.integers(1, 4),
    st.floats(1e-4, 1.0),
    st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_the_baseline_is_the_ridge_regression_of_each_task(
    time: int, tasks: int, each: int, ridge: float, seed: int
) -> None:
    x, to_go, valid = rollouts(time, tasks * each, seed)
    found = linear_baseline(x, to_go, valid, tasks, ridge)
    for i in range(tasks):
        mine = slice(each * i, each * (i + 1))
        every, collected = features(x[:, mine]), valid[:, mine].numpy()
        a, b = every[collected], to_go[:, mine].numpy()[collected]
        penalty = np.sqrt(ridge * len(a)) * np.eye(a.shape[1])
        weights, *_ = np.linalg.lstsq(
            np.vstack([a, penalty]), np.concatenate([b, np.zeros(len(penalty))])
        )
        assert np.allclose(found[:, mine], every @ weights, rtol=1e-6, atol=1e-7)


def test_the_baseline_fits_exactly_what_is_linear_in_its_features() -> None:
    x, _, valid = rollouts(60, 6)
    weights = np.random.default_rng(0).standard_normal((2, 10))
    exact = [torch.from_numpy(features(x[:, 3 * i : 3 * i + 3]) @ w) for i, w in enumerate(weights)]
    to_go = torch.cat(exact, 1)
    fits = [linear_baseline(x, to_go, valid, 2, ridge) for ridge in (1e-2, 1e-5, 1e-12)]
    rough, fine, finest = ((fit - to_go)[valid].abs().max() for fit in fits)
    assert rough > fine > finest
    assert finest < 1e-6
    assert (linear_baseline(x, to_go, valid, 1, 1e-12) - to_go)[valid].abs().max() > 0.1


def test_the_baseline_ignores_steps_that_are_not_valid() -> None:
    x, to_go, valid = rollouts(12, 6)
    assert not valid.all()
    other_x = torch.where(valid[..., None], x, 1e3)
    other = linear_baseline(other_x, torch.where(valid, to_go, -1e6), valid, 2)
    assert torch.equal(other[valid], linear_baseline(x, to_go, valid, 2)[valid])


def test_another_tasks_rollouts_do_not_move_the_baseline() -> None:
    x, to_go, valid = rollouts(12, 6)
    before = linear_baseline(x, to_go, valid, 2)
    x[:, 3:], to_go[:, 3:], valid[:, 3:] = -2.0 * x[:, 3:], 100.0, False
    after = linear_baseline(x, to_go, valid, 2)
    assert torch.allclose(after[:, :3], before[:, :3], rtol=1e-12)
    assert not after[:, 3:].any()
    assert torch.allclose(
        linear_baseline(x[:, :3], to_go[:, :3], valid[:, :3], 1), before[:, :3], rtol=1e-12
    )


def test_the_baseline_is_finite_where_nothing_can_be_fitted() -> None:
    x, to_go, valid = (y.float() if y.is_floating_point() else y for y in rollouts(12, 6))
    assert not linear_baseline(x, to_go, torch.zeros_like(valid), 2).any()
    for same in (torch.zeros_like(x), torch.full_like(x, 10.0)):
        found = linear_baseline(same, to_go, valid, 2)
        assert found.isfinite().all()
        assert found.dtype == torch.float32
    assert linear_baseline(x[:0], to_go[:0], valid[:0], 2).shape == (0, 6)
    ones = linear_baseline(torch.zeros_like(x), torch.ones_like(to_go), torch.ones_like(valid), 2)
    assert torch.allclose(ones, torch.ones_like(ones), atol=0.01)
