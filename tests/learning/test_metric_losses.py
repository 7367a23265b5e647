import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobot.learning.metric_losses import (
    LOSSES,
    distance_loss,
    nearest_prototype,
    novelty_threshold,
    rank_correlation,
)

SHARP = torch.tensor(1.7, dtype=torch.float64)
LABEL = torch.tensor([2, 0, 1, 0, 2])
"""Classes of five tasks, of which two pairs are the same."""


def points(seed: int = 0, tasks: int = 5, windows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, windows, 3, generator=generator, dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    return math.dist(a.tolist(), b.tolist())


def directly_prototypical(z: Tensor, label: list[int]) -> float:
    half = z.shape[1] // 2
    centre = {}
    for k in set(label):
        tasks = [z[i, :half].mean(0) for i, own in enumerate(label) if own == k]
        centre[k] = sum(tasks[1:], start=tasks[0]) / len(tasks)
    losses = []
    for i, own in enumerate(label):
        for q in z[i, half:]:
            similarity = {k: math.exp(-float(SHARP) * gap(q, c) ** 2) for k, c in centre.items()}
            losses.append(-math.log(similarity[own] / sum(similarity.values())))
    return sum(losses) / len(losses)


def directly_contrastive(z: Tensor, label: list[int]) -> float:
    flat = [(label[i], p) for i in range(len(z)) for p in z[i]]
    losses = []
    for i, (own, p) in enumerate(flat):
        similarity = {
            j: math.exp(-float(SHARP) * gap(p, q) ** 2) for j, (_, q) in enumerate(flat) if j != i
        }
        alike = [j for j in similarity if flat[j][0] == own]
        losses.append(
            -sum(math.log(similarity[j] / sum(similarity.values())) for j in alike) / len(alike)
        )
    return sum(losses) / len(losses)


def directly_siamese(z: Tensor, label: list[int]) -> float:
    flat = [(label[i], p) for i in range(len(z)) for p in z[i]]
    near, far, margin = [], [], float(SHARP) ** -0.5
    for i, (a, p) in enumerate(flat):
        for j, (b, q) in enumerate(flat):
            if i != j and a == b:
                near.append((gap(p, q) / margin) ** 2)
            if a != b:
                far.append(max(0.0, 1.0 - gap(p, q) / margin) ** 2)
    return sum(near) / len(near) + sum(far) / len(far)


DIRECT = {
    "prototypical": directly_prototypical,
    "contrastive": directly_contrastive,
    "siamese": directly_siamese,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_what_their_papers_define(name: str) -> None:
    z = points()
    assert float(LOSSES[name](z, LABEL, SHARP)) == pytest.approx(
        DIRECT[name](z, LABEL.tolist()), rel=1e-9
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_low_where_tasks_stand_apart_and_do_not_mind_the_order_of_tasks(
    name: str,
) -> None:
    centre = 5.0 * torch.eye(5, dtype=torch.float64)[:, None, :3] + torch.arange(5.0)[:, None, None]
    label = torch.arange(5)
    tidy, mixed = centre + 0.01 * points(), points()
    least = math.log(3) if name == "contrastive" else 0.0  # three others are equally alike
    assert (
        LOSSES[name](tidy, label, SHARP) - least < 0.01 < LOSSES[name](mixed, label, SHARP) - least
    )
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(
        LOSSES[name](mixed[order], LABEL[order], SHARP), LOSSES[name](mixed, LABEL, SHARP)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_where_all_points_are_one_and_a_single_class_is_nothing_to_tell_apart(
    name: str,
) -> None:
    z = torch.zeros(4, 2, 3, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](z, torch.tensor([0, 1, 2, 1]), SHARP) + distance_loss(
        z, torch.eye(4).double()
    )
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.isfinite().all()
    assert LOSSES[name](points(tasks=3), torch.zeros(3, dtype=torch.int64), SHARP).isfinite()


def test_stress_compares_the_distances_of_all_pairs() -> None:
    z, task = points(tasks=3, windows=2), torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    flat = [(float(task[i]), p) for i in range(3) for p in z[i]]
    errors = [(gap(p, q) - abs(a - b)) ** 2 for a, p in flat for b, q in flat]
    assert float(distance_loss(z, task)) == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    line = task[:, None].expand(3, 2, 1) * torch.tensor([1.0, 0.0, 0.0])
    assert distance_loss(line, task) < 1e-10


def test_the_nearest_prototype() -> None:
    prototype = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    z = torch.tensor([[[0.9, 0.0], [1.1, 0.0]], [[0.0, 2.0], [5.0, 0.0]]])
    assert nearest_prototype(z, prototype).tolist() == [[0, 1], [2, 1]]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_the_threshold_lets_the_asked_share_of_training_tasks_be_known_by_others_than_themselves(
    seed: int, known: float
) -> None:
    z = points(seed, tasks=12)
    prototype = z.mean(1)
    threshold = novelty_threshold(z, prototype, known)
    near = [min(gap(p, prototype[j]) for j in range(12) if j != i) for i in range(12) for p in z[i]]
    share = sum(d <= threshold + 1e-12 for d in near) / len(near)
    assert share == pytest.approx(known, abs=1.5 / len(near))
    assert novelty_threshold(z[:1], prototype[:1]) == math.inf


def test_rank_correlation_sees_order_alone_and_shares_ranks() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1.0)
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    # ranks 1.5, 1.5, 3, 4 and 1, 2, 3.5, 3.5
    a, b = torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 7.0, 7.0])
    ranks = torch.tensor([[1.5, 1.5, 3.0, 4.0], [1.0, 2.0, 3.5, 3.5]])
    assert rank_correlation(a, b) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), rel=1e-5)
