import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobot.errors import MetarobotError
from metarobot.learning.linear_recurrence import linear_scan
from metarobot.learning.networks import RunningNorm, log_prob, mlp
from metarobot.learning.recurrent_memories import MEMORIES, make_memory


def loop(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """h_t = a_t h_{t−1} + b_t, one step after the other."""
    h, out = torch.zeros_like(b[0]), []
    for gate, value in zip(a, b, strict=True):
        h = gate * h + value
        out.append(h)
    return torch.stack(out)


def gates(
    time: int, seed: int = 0, worlds: int = 3, width: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    a = torch.rand(time, worlds, width, generator=rng, dtype=torch.float64)
    b = torch.randn(time, worlds, width, generator=rng, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


@given(st.integers(1, 50), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_scan_and_its_gradient_equal_the_loop(time: int, seed: int) -> None:
    a, b = gates(time, seed)
    weight = torch.randn(
        time, 3, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    fast, slow = linear_scan(a, b), loop(a, b)
    assert torch.allclose(fast, slow, atol=1e-12)
    gradients = [torch.autograd.grad((h * weight).sum(), (a, b)) for h in (fast, slow)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 7, 9, 16])
def test_the_scans_gradient_equals_finite_differences(time: int) -> None:
    assert torch.autograd.gradcheck(linear_scan, gates(time, worlds=1))


def test_the_scan_takes_gates_at_their_extremes() -> None:
    _, b = gates(12)
    assert torch.equal(linear_scan(torch.zeros_like(b), b), b)
    assert torch.allclose(linear_scan(torch.ones_like(b), b), b.cumsum(0))


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("time", [1, 6, 23])
def test_a_memory_stepped_equals_the_memory_run_over_the_sequence(kind: str, time: int) -> None:
    torch.manual_seed(0)
    m = make_memory(kind, 5, 8)
    x = torch.randn(time, 4, 5)
    state, out = m.begin(4), []
    for row in x:
        h, state = m.step(row, state)
        out.append(h)
    assert torch.allclose(torch.stack(out), m.sequence(x), atol=1e-6)
    assert m.sequence(x).shape == (time, 4, 8)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_step_leaves_the_old_state_as_it_was(kind: str) -> None:
    m = make_memory(kind, 5, 8)
    state = m.begin(4)
    _, after = m.step(torch.randn(4, 5), state)
    assert all((s == 0).all() for s in state)
    assert all(s.shape == (4, 8) and (s != 0).any() for s in after)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_depends_on_the_past_and_never_on_the_future(kind: str) -> None:
    torch.manual_seed(0)
    m = make_memory(kind, 5, 8)
    x = torch.randn(20, 2, 5)
    changed = x.clone()
    changed[10, 0] += 1.0
    before, after = m.sequence(x), m.sequence(changed)
    assert torch.allclose(before[:10], after[:10], atol=1e-7)
    assert torch.allclose(before[:, 1], after[:, 1], atol=1e-7)
    assert ((before[10:, 0] - after[10:, 0]).abs().max(1).values > 1e-5).all()


def test_the_untrained_linear_memory_has_many_time_scales() -> None:
    m = make_memory("linear", 3, 64)
    keeps = 1 - torch.sigmoid(m.project.bias[:64].detach())
    assert float(keeps.min()) == pytest.approx(0.5)
    assert keeps.max() > 0.99


def test_an_unknown_memory_is_answered_with_those_that_exist() -> None:
    with pytest.raises(
        MetarobotError, match="no memory called 'rnn'; there are: linear, gru, lstm"
    ):
        make_memory("rnn", 1, 1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_merged_batches_have_the_statistics_of_all_samples_at_once(
    sizes: list[int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(n, 3, generator=rng).double() * 10**i + 100 * i for i, n in enumerate(sizes)
    ]
    norm = RunningNorm(3)
    for batch in batches:
        norm.update(batch)
    every = torch.cat(batches)
    assert norm.count == len(every)
    assert torch.allclose(norm.mean, every.mean(0))
    assert torch.allclose(norm.m2 / norm.count, every.var(0, correction=0), rtol=1e-9, atol=1e-9)


def test_the_norm_makes_zero_mean_and_unit_deviation_and_clips() -> None:
    x = (
        torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.01])
        + 50
    )
    norm = RunningNorm(2, limit=5.0)
    assert torch.equal(norm(torch.ones(1, 2)), torch.ones(1, 2))
    norm.update(x)
    y = norm(x.view(10, 100, 2))
    assert y.shape == (10, 100, 2)
    assert y.dtype == torch.float32
    assert torch.allclose(y.mean((0, 1)), torch.zeros(2), atol=1e-2)
    assert torch.allclose(y.std((0, 1)), torch.ones(2), atol=1e-2)
    assert norm(torch.tensor([1e6, -1e6])).tolist() == [5.0, -5.0]


def test_a_constant_feature_stays_finite() -> None:
    norm = RunningNorm(1)
    norm.update(torch.full((10, 1), 3.0))
    assert norm(torch.tensor([[3.0]])).item() == 0.0
    assert torch.isfinite(norm(torch.tensor([[4.0]]))).all()


def test_the_norm_is_buffers_that_a_checkpoint_carries() -> None:
    norm = RunningNorm(3)
    norm.update(torch.randn(20, 3))
    back = RunningNorm(3)
    back.load_state_dict(norm.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(back(x), norm(x))
    for n in (back, norm):
        n.update(torch.ones(4, 3))
    assert torch.equal(back(x), norm(x))
    assert not list(norm.parameters())


def test_log_prob_equals_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, action = torch.randn(2, 7, 5, 3, generator=rng)
    log_std = torch.randn(3, generator=rng)
    theirs = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    assert torch.allclose(log_prob(mean, log_std, action), theirs, atol=1e-5)


def test_the_perceptron_is_orthogonal_with_the_last_layer_scaled() -> None:
    net = mlp(8, (8, 8), 4, gain=0.01)
    first, _, second, _, last = net
    for layer, gain in ((first, math.sqrt(2)), (second, math.sqrt(2)), (last, 0.01)):
        square = layer.weight @ layer.weight.T
        assert torch.allclose(square, gain**2 * torch.eye(len(square)), atol=1e-5)
        assert (layer.bias == 0).all()
