"""Metric learning: losses that shape an embedding space, and distances in it; pure functions.

The points of a batch are ``(task, window, embedding)``: of each task several windows (sets of
transitions), each embedded. Similarity of two points is minus their squared distance, times a
*sharpness* (an inverse temperature).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

MetricLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(points ``(task, window, embedding)``, class of each task ``(task,)``, sharpness) -> scalar."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances of points ``(n, embedding)`` and ``(m, embedding)``, ``(n, m)``."""
    return (a[:, None] - b).square().sum(-1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return distances of points ``(n, embedding)`` and ``(m, embedding)``, ``(n, m)``."""
    # the small constant keeps the gradient finite where two points coincide
    return (squared_distances(a, b) + 1e-12).sqrt()


def prototypical(z: Tensor, label: Tensor, sharpness: Tensor) -> Tensor:
    """Classify query windows by distance to the class means of support (Snell et al. 2017, eq. 2).

    The earlier half of the windows is the support, the later half the query.
    """
    support, query = z.chunk(2, 1)
    member = functional.one_hot(label).to(z.dtype)
    # c_k = mean of the support points of class k
    prototype = (member / member.sum(0)).mT @ support.mean(1)

    # p(k | x) = softmax_k(−s ‖z − c_k‖²)
    logits = -sharpness * squared_distances(query.flatten(0, 1), prototype)
    return functional.cross_entropy(logits, label.repeat_interleave(query.shape[1]))


def contrastive(z: Tensor, label: Tensor, sharpness: Tensor) -> Tensor:
    """Make windows of one class more similar than others (Khosla et al. 2020, eq. 2).

    Similarity is −‖z − z'‖² in place of a dot product; on the unit sphere the two are the same at
    twice the temperature.
    """
    points = z.flatten(0, 1)
    label = label.repeat_interleave(z.shape[1])
    itself = torch.eye(len(points), dtype=torch.bool, device=z.device)
    similarity = -sharpness * squared_distances(points, points)
    logits = similarity.masked_fill(itself, -torch.inf)
    positive = (label[:, None] == label) & ~itself

    # L_i = −1/|P(i)| Σ_{p ∈ P(i)} log softmax_i(p), P(i) the other windows of the same class
    log_softmax = logits - logits.logsumexp(1, keepdim=True)
    positive_terms = torch.where(positive, log_softmax, 0.0)
    return -(positive_terms.sum(1) / positive.sum(1)).mean()


def siamese(z: Tensor, label: Tensor, sharpness: Tensor) -> Tensor:
    """Pull pairs of one class together, push others beyond a margin (Hadsell et al. 2006, eq. 4).

    Distances are measured in margins; the margin is 1/√sharpness and is not learned. Pairs of one
    class and pairs of two classes have the same total weight.
    """
    points = z.flatten(0, 1)
    label = label.repeat_interleave(z.shape[1])
    itself = torch.eye(len(points), dtype=torch.bool, device=z.device)
    same_class = label[:, None] == label
    distance = distances(points, points) * sharpness.detach().sqrt()

    # D² for pairs of one class, max(0, 1 − D)² for the others
    pulled = distance[same_class & ~itself].square()
    pushed = (1.0 - distance[~same_class]).clamp_min(0).square()
    return pulled.mean() + pushed.sum() / max(len(pushed), 1)


LOSSES: dict[str, MetricLoss] = {
    "prototypical": prototypical,
    "contrastive": contrastive,
    "siamese": siamese,
}
"""Name -> metric loss."""


def distance_loss(z: Tensor, task: Tensor) -> Tensor:
    """Return the mean squared error of distances of points to those of tasks (Kruskal 1964).

    ``z`` is ``(task, window, embedding)``, ``task`` ``(task, parameter)`` the encoded tasks.
    """
    points = z.flatten(0, 1)
    tasks = task.repeat_interleave(z.shape[1], 0)
    return (distances(points, points) - distances(tasks, tasks)).square().mean()


def nearest_prototype(z: Tensor, prototype: Tensor) -> Tensor:
    """Return the index of the prototype ``(n, embedding)`` nearest to each point.

    ``z`` is ``(..., embedding)``, the result ``(...,)``.
    """
    return squared_distances(z.flatten(0, -2), prototype).argmin(1).view(z.shape[:-1])


def novelty_threshold(z: Tensor, prototype: Tensor, known: float = 0.95) -> float:
    """Return the distance beyond which a task counts as unlike all prototypes.

    A share ``known`` of the points lies within it from the nearest prototype of *another* task.
    Each point stands in for a task that was never met, so new tasks from the training distribution
    are recognised about as often.

    Args:
        z: Points, ``(task, window, embedding)``.
        prototype: Prototypes of the same tasks, ``(task, embedding)``.
        known: The share.

    Returns:
        The distance; infinite for fewer than two tasks.
    """
    if len(z) < 2:
        return float("inf")
    tasks, windows = z.shape[:2]
    squared = squared_distances(z.flatten(0, 1), prototype).view(tasks, windows, tasks)
    own = torch.eye(tasks, dtype=torch.bool, device=z.device)[:, None]
    nearest_other = squared.masked_fill(own, torch.inf).amin(2).sqrt()
    return float(nearest_other.quantile(known))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two lists of numbers ``(n,)``.

    Equal numbers share their mean rank. NaN if all numbers of a list are equal.
    """
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    """Return the rank of each number, from 1; equal ones get the mean of their ranks."""
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    mean_rank = count.cumsum(0) - (count - 1) / 2.0
    ranks: Tensor = mean_rank[place].double()
    return ranks
