"""Likeness as distance: losses that shape a space of points, and what is near in it; pure
functions.

Points of a batch are ``(task, window, embedding)``: several sets of transitions of each task,
embedded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(points ``(task, window, embedding)``, class of each task ``(task,)``, sharpness) -> scalar."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of points ``(n, embedding)`` and ``(m, embedding)``: ``(n, m)``."""
    return (a[:, None] - b).square().sum(-1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances of points ``(n, embedding)`` and ``(m, embedding)``, ``(n, m)``; their slope is
    finite at 0 too.
    """
    return (squared_distances(a, b) + 1e-12).sqrt()


def prototypical(z: Tensor, label: Tensor, sharpness: Tensor) -> Tensor:
    """Classify the later half of the windows by distance to the mean of the earlier (Snell et al.
    2017, eq. 2).
    """
    support, query = z.chunk(2, 1)
    member = functional.one_hot(label).to(z.dtype)
    prototype = (member / member.sum(0)).mT @ support.mean(1)
    # p(k | x) = softmax_k(−s ‖z − c_k‖²)
    logits = -sharpness * squared_distances(query.flatten(0, 1), prototype)
    return functional.cross_entropy(logits, label.repeat_interleave(query.shape[1]))


def contrastive(z: Tensor, label: Tensor, sharpness: Tensor) -> Tensor:
    """Make windows of a task more alike than others (Khosla et al. 2020, eq. 2).

    Likeness is −‖z − z'‖² in the place of a dot product; on the unit sphere it is the same at twice
    the temperature.
    """
    points, label = z.flatten(0, 1), label.repeat_interleave(z.shape[1])
    itself = torch.eye(len(points), dtype=torch.bool, device=z.device)
    logits = (-sharpness * squared_distances(points, points)).masked_fill(itself, -torch.inf)
    alike = (label[:, None] == label) & ~itself
    # −1/|P(i)| Σ_{p ∈ P(i)} log softmax_i(p)
    each = torch.where(alike, logits - logits.logsumexp(1, keepdim=True), 0.0)
    return -(each.sum(1) / alike.sum(1)).mean()


def siamese(z: Tensor, label: Tensor, sharpness: Tensor) -> Tensor:
    """Draw pairs of one task together, push others beyond the margin 1/√s (Hadsell et al. 2006, eq.
    4), in margins.

    Pairs that are alike and pairs that are not count as much; the margin is not learned.
    """
    points, label = z.flatten(0, 1), label.repeat_interleave(z.shape[1])
    itself = torch.eye(len(points), dtype=torch.bool, device=z.device)
    alike = label[:, None] == label
    gap = distances(points, points) * sharpness.detach().sqrt()
    near, far = gap[alike & ~itself].square(), (1.0 - gap[~alike]).clamp_min(0).square()
    return near.mean() + far.sum() / max(len(far), 1)


LOSSES: dict[str, Loss] = {
    "prototypical": prototypical,
    "contrastive": contrastive,
    "siamese": siamese,
}


def distance_loss(z: Tensor, task: Tensor) -> Tensor:
    """Mean squared error of distances of points to those of their tasks ``(task, parameter)``
    (Kruskal 1964).
    """
    points, tasks = z.flatten(0, 1), task.repeat_interleave(z.shape[1], 0)
    return (distances(points, points) - distances(tasks, tasks)).square().mean()


def nearest_prototype(z: Tensor, prototype: Tensor) -> Tensor:
    """Return which prototype ``(n, embedding)`` each point ``(..., embedding)`` is nearest to,
    ``(...,)``.
    """
    return squared_distances(z.flatten(0, -2), prototype).argmin(1).view(z.shape[:-1])


def novelty_threshold(z: Tensor, prototype: Tensor, known: float = 0.95) -> float:
    """Return the distance within which a share ``known`` of the points have a prototype of another
    task.

    Points ``(task, window, embedding)`` are those of the prototypes ``(task, embedding)``. Each
    stands for a task that was never met: so a new task from where these came from is taken for
    known as often.
    """
    if len(z) < 2:
        return float("inf")
    gap = squared_distances(z.flatten(0, 1), prototype).view(*z.shape[:2], -1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)[:, None]
    return float(gap.masked_fill(own, torch.inf).amin(2).sqrt().quantile(known))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists of numbers, equal ones sharing their mean rank; NaN
    if all are equal.
    """
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    mean: Tensor = (count.cumsum(0) - (count - 1) / 2.0)[place].double()
    return mean
