import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobot.learning.trust_region import (
    backtracking_line_search,
    conjugate_gradient,
    scale_to_kl_bound,
)


def spd(n: int, seed: int, condition: float = 100.0) -> tuple[Tensor, Tensor]:
    """A random symmetric positive matrix, float64, and a vector."""
    rng = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))
    eigenvalues = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    return basis * eigenvalues @ basis.T, torch.randn(n, generator=rng, dtype=torch.float64)


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ v


@given(st.integers(1, 12), st.floats(1.0, 1000.0), st.floats(1e-6, 1e6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_conjugate_gradient_solves_positive_systems(
    n: int, condition: float, size: float, seed: int
) -> None:
    a, b = spd(n, seed, condition)
    x = conjugate_gradient(Counted(a), size * b, 4 * n)
    assert (a @ x - size * b).norm() <= 1.1e-5 * size * b.norm()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_iteration_is_the_best_of_its_krylov_space(k: int) -> None:
    a, b = spd(8, 0)
    product = Counted(a)
    x = conjugate_gradient(product, b, k)
    space = torch.stack([torch.linalg.matrix_power(a / 100, i) @ b for i in range(k)], 1)
    best = space @ torch.linalg.solve(space.T @ a @ space, space.T @ b)
    assert torch.allclose(x, best, rtol=1e-8, atol=1e-10)
    assert product.calls == k


def test_conjugate_gradient_stops_where_the_residual_vanishes() -> None:
    product = Counted(3 * torch.eye(5, dtype=torch.float64))
    b = torch.arange(5, dtype=torch.float64)
    assert torch.allclose(conjugate_gradient(product, b, 10), b / 3)
    assert product.calls == 1


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_broken_gives_no_direction(value: float) -> None:
    b = torch.full((4,), value)
    assert torch.equal(conjugate_gradient(Counted(torch.eye(4)), b, 10), torch.zeros(4))
    b[1:] = 1.0
    assert conjugate_gradient(Counted(torch.eye(4)), b, 10).isfinite().all()


def test_a_matrix_that_is_not_positive_ends_the_search_with_what_was_found() -> None:
    b = torch.tensor([1.0, 0.1])
    for worst in (-1.0, -math.inf, math.nan):
        product = Counted(torch.tensor([[worst, 0.0], [0.0, worst]]))
        assert torch.equal(conjugate_gradient(product, b, 10), torch.zeros(2))
        assert product.calls == 1
    saddle = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
    assert torch.equal(conjugate_gradient(Counted(saddle), b, 10), b * (b @ b) / (b @ saddle @ b))


def test_solving_leaves_the_right_hand_side_as_it_was() -> None:
    a, b = spd(6, 1)
    before = b.clone()
    conjugate_gradient(Counted(a), b, 6)
    assert torch.equal(b, before)


@given(st.integers(1, 8), st.floats(1e-6, 10.0), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_longest_step_reaches_the_bound_and_keeps_the_direction(
    n: int, bound: float, seed: int
) -> None:
    a, b = spd(n, seed)
    x = scale_to_kl_bound(b, Counted(a), bound)
    assert float(0.5 * x @ a @ x) == pytest.approx(bound, rel=1e-9)
    assert torch.allclose(x / x.norm(), b / b.norm(), atol=1e-12)


@pytest.mark.parametrize("matrix", [torch.zeros(2, 2), -torch.eye(2), torch.full((2, 2), math.nan)])
def test_without_curvature_there_is_no_longest_step(matrix: Tensor) -> None:
    assert torch.equal(scale_to_kl_bound(torch.ones(2), Counted(matrix), 0.1), torch.zeros(2))
    assert torch.equal(
        scale_to_kl_bound(torch.full((2,), math.nan), Counted(torch.eye(2)), 0.1), torch.zeros(2)
    )


class Tried:
    """An objective of one number that writes down where it was asked."""

    def __init__(
        self, gain: Callable[[float], float], divergence: Callable[[float], float]
    ) -> None:
        self.gain, self.divergence = gain, divergence
        self.asked: list[float] = []

    def __call__(self, step: Tensor) -> tuple[float, float]:
        s = step.item()
        self.asked.append(s)
        return self.gain(s), self.divergence(s)


def test_the_line_search_takes_the_longest_step_that_gains_within_the_bound() -> None:
    objective = Tried(lambda s: 5.0 + s - s * s, lambda s: s * s)
    step, found = backtracking_line_search(torch.tensor([4.0]), objective, 1.0, 0.5, 10)
    assert step.tolist() == [0.5]
    assert found == (0.25, 0.25, True, 4)
    assert objective.asked == [0.0, 4.0, 2.0, 1.0, 0.5]


def test_a_divergence_of_just_the_bound_is_allowed() -> None:
    step, found = backtracking_line_search(
        torch.tensor([4.0]), Tried(lambda s: s, lambda s: s * s), 1.0, 0.5, 3
    )
    assert step.tolist() == [1.0]
    assert found == (1.0, 1.0, True, 3)
    _, found = backtracking_line_search(
        torch.tensor([1.0]), Tried(lambda s: s, lambda s: s * s), 1.0, 0.5, 3
    )
    assert found.tries == 1


@given(
    st.floats(0.1, 10),
    st.floats(0.2, 0.95),
    st.integers(1, 12),
    st.floats(0.01, 5),
    st.floats(0.1, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_line_search_equals_trying_every_step(
    length: float, shrink: float, tries: int, bound: float, bend: float
) -> None:
    objective = Tried(lambda s: math.sin(bend * s), lambda s: s * s)
    step, found = backtracking_line_search(
        torch.tensor([length], dtype=torch.float64), objective, bound, shrink, tries
    )
    steps = [torch.tensor(length, dtype=torch.float64)]
    while len(steps) < tries:
        steps.append(steps[-1] * shrink)
    good = [i for i, s in enumerate(steps) if math.sin(bend * s) > 0 and float(s * s) <= bound]
    assert found.success == bool(good)
    assert found.tries == (good[0] + 1 if good else tries)
    assert step.item() == (steps[good[0]].item() if good else 0.0)
    assert len(objective.asked) == 1 + found.tries


@pytest.mark.parametrize(
    "objective",
    [
        Tried(lambda s: -abs(s), lambda s: 0.0),
        Tried(lambda s: 0.0, lambda s: 0.0),
        Tried(lambda s: s, lambda s: 2.0),
        Tried(lambda s: math.nan if s else 0.0, lambda s: 0.0),
        Tried(lambda s: s, lambda s: math.nan),
        Tried(lambda s: s, lambda s: math.inf),
        Tried(lambda s: math.nan, lambda s: math.nan),
    ],
    ids=[
        "worse",
        "equal",
        "too far",
        "gain NaN",
        "divergence NaN",
        "divergence infinite",
        "all NaN",
    ],
)
def test_where_no_step_will_do_nothing_moves(objective: Tried) -> None:
    step, found = backtracking_line_search(torch.tensor([1.0]), objective, 1.0, 0.7, 5)
    assert torch.equal(step, torch.zeros(1))
    assert found == (0.0, 0.0, False, 5)
    assert len(objective.asked) == 6


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_step_is_not_taken(broken: float) -> None:
    step, found = backtracking_line_search(
        torch.tensor([broken]), Tried(lambda s: s, lambda s: s * s), 1.0, 0.7, 5
    )
    assert torch.equal(step, torch.zeros(1))
    assert not found.success


def test_a_zero_step_is_not_searched_along() -> None:
    objective = Tried(lambda s: s, lambda s: s * s)
    step, found = backtracking_line_search(torch.zeros(1), objective, 1.0, 0.7, 5)
    assert torch.equal(step, torch.zeros(1))
    assert not found.success
    assert objective.asked == [0.0]
