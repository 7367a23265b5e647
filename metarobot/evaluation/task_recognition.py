"""Recognition measured: which training tasks a new one is most like, whether it is new, and which
of the new ones.

Nothing is learned here, and no task is told: an agent that keeps prototypes lives each held-out
task and embeds what it lived there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.learning.metric_losses import (
    distances,
    nearest_prototype,
    novelty_threshold,
    rank_correlation,
)
from metarobot.tasks.distributions import Uniform
from metarobot.tasks.space import Task, TaskSpace
from metarobot.training.collect import collect
from metarobot.training.run_folder import Run
from metarobot.types import Rollout


class RecognitionError(MetarobotError):
    """A run that recognises nothing, or too little lived to be recognised by."""


@dataclass(frozen=True, kw_only=True)
class RecognitionConfig:
    """What is lived, and how much of it is shown."""

    split: str = "test"
    tasks: int = 20
    """Number of tasks drawn from the split."""
    even: bool = False
    """Space them evenly over the training range of the one parameter instead: how finely tasks are
    told apart, without the luck of draws that nearly coincide."""
    transitions: int = 50
    """What a task is recognised from: so many first transitions of a fresh episode."""
    neighbours: int = 5
    """Prototypes named for each task."""
    support: int = 5
    """Episodes whose first transitions, as many, make the prototype of each held-out task."""
    queries: int = 5
    """Fresh episodes of each task to recognise."""
    seed: int = 0
    """Draws tasks and starts."""
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "transitions", "neighbours", "support", "queries"):
            if getattr(self, name) < 1:
                raise RecognitionError(f"{name} must be at least 1, not {getattr(self, name)}")


def recognise(
    run: Run, quiz: RecognitionConfig, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Live the tasks of a split and recognise them; return the report as JSON data.

    ``recognised``: the share of queries whose nearest held-out prototype, made of other episodes,
    is their own. ``new``: the share that lies farther from all prototypes of training tasks than
    one of them would from the others. ``tick`` is called after each of the ``support + queries``
    rounds of episodes.
    """
    agent, space = run.load_agent(), run.family.space
    _check(run, agent, quiz)
    tasks = (
        _spaced(space, quiz.tasks) if quiz.even else space.sample(quiz.split, quiz.tasks, quiz.seed)
    )
    support, query = _live(agent, Env(run.family, tasks, threads=quiz.threads), tasks, quiz, tick)
    held = len(agent.bank)
    prototype, known, windows = (
        agent.bank.prototype[:held],
        agent.bank.task[:held],
        agent.embedded(quiz.transitions),
    )
    threshold, encoded = novelty_threshold(windows, prototype), space.encode(tasks)
    away = distances(query.flatten(0, 1), prototype).view(len(query), len(tasks), held)
    right = (encoded[nearest_prototype(query, support)] == encoded).all(-1).double()
    new = (away.amin(2) > threshold).double()
    flat, values = _plane(prototype), space.decode(known)
    within = distances(windows.flatten(0, 1), prototype).view(held, -1, held).mean(1).diagonal()
    order = away[0].argsort(1)[:, : quiz.neighbours]
    return {
        "family": run.family.name,
        "agent": run.agent,
        "run": run.name,
        "steps": run.steps,
        **asdict(quiz),
        "threshold": threshold,
        "recognised": _share(right),
        "chance": 1.0 / len(torch.unique(encoded, dim=0)),
        "new": _share(new),
        "rank_correlation": {
            "prototypes": rank_correlation(*_pairs(prototype, known)),
            "held_out": rank_correlation(
                away.mean(0).flatten(), distances(encoded, known).flatten()
            ),
        },
        "prototypes": [
            {
                "task": values[i],
                "transitions": int(agent.bank.lived[i].sum()),
                "within": float(within[i]),
                "xy": xy,
            }
            for i, xy in enumerate(flat(prototype).tolist())
        ],
        "held_out": [
            {
                "task": tasks[i].as_dict(),
                "recognised": float(right[:, i].mean()),
                "new": bool(new[0, i]),
                "xy": xy,
                "neighbours": [
                    {"task": values[j], "distance": float(away[0, i, j])} for j in order[i]
                ],
            }
            for i, xy in enumerate(flat(query[0]).tolist())
        ],
    }


def parameter(space: TaskSpace, name: str) -> str:
    """Return the parameter of that name, or the first for an empty one; raise if there is none."""
    names = [p.name for p in space.params if not p.nuisance]
    if name and name not in names:
        raise RecognitionError(
            f"{space.name} has no parameter {name!r}; it has: {', '.join(names)}"
        )
    return name or names[0]


def _spaced(space: TaskSpace, n: int) -> list[Task]:
    """Return the middles of ``n`` equal parts of the parameter's training range, as tasks."""
    first, *others = space.params
    low, high = first.train.low, first.train.high
    if others or not isinstance(first.train, Uniform):
        raise RecognitionError(
            f"{space.name} is not one parameter drawn uniformly: its tasks have no even spacing"
        )
    return [space.task(**{first.name: low + (high - low) * (i + 0.5) / n}) for i in range(n)]


def _check(run: Run, agent: Any, quiz: RecognitionConfig) -> None:
    """Raise for a run that cannot say what a task is like."""
    if not hasattr(agent, "bank"):
        raise RecognitionError(
            f"{run.folder} keeps no prototypes: its agent is {run.agent!r}; train one as prototype"
        )
    if quiz.neighbours > len(agent.bank):
        raise RecognitionError(
            f"{run.folder} keeps {len(agent.bank)} prototypes, fewer than {quiz.neighbours} neighbours"
        )


def _live(
    agent: Any, env: Env, tasks: Sequence[Task], quiz: RecognitionConfig, tick: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Return the prototypes of held-out tasks ``(task, ...)``, and queries ``(query, task, ...)``
    of other episodes.
    """

    def episode(k: int) -> Rollout:
        (lived,) = collect(
            agent, env, tasks, episodes=1, seed=quiz.seed + k, explore=False
        ).episodes
        least = int(lived.valid.sum(0).min())
        if least < quiz.transitions:
            task = tasks[int(lived.valid.sum(0).argmin())]
            raise RecognitionError(
                f"{task.describe()}: the episode ended after {least} transitions; ask for fewer"
            )
        tick()
        return lived

    z = torch.stack(
        [agent.embed(episode(k), quiz.transitions) for k in range(quiz.support + quiz.queries)]
    )
    return z[: quiz.support].mean(0), z[quiz.support :]


def _share(x: Tensor) -> dict[str, Any]:
    """Return the mean of ``(query, task)``, and its interval over tasks."""
    return {
        "mean": float(x.mean()),
        "ci95": bootstrap_interval(x.mean(0, keepdim=True).numpy(), lambda v: v.mean()),
    }


def _pairs(z: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of every two points, and of their tasks."""
    i, j = torch.triu_indices(len(z), len(z), 1)
    return distances(z, z)[i, j], distances(task, task)[i, j]


def _plane(z: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the projection on the two directions in which points ``(n, embedding)`` vary most
    (Pearson 1901).
    """
    mean = z.mean(0)
    _, _, directions = torch.linalg.svd(z - mean, full_matrices=False)
    directions = directions[:2] * directions[:2].sum(1, keepdim=True).sign()
    return lambda x: torch.einsum("...e,ae->...a", x - mean, directions)
