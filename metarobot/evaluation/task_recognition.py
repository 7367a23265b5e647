"""Task recognition: the training tasks a new task resembles, and whether it is an unknown one.

Nothing is learned here, and nobody tells the agent its task: an agent that keeps prototypes
(``EmbedsTasks``) plays each held-out task and embeds the transitions it collects there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobot.config_bounds import Count, CountOrZero, check_bounds
from metarobot.env.factory import make_env
from metarobot.errors import MetarobotError
from metarobot.evaluation.protocol import check_actions, check_fault_count, faulted_episodes
from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.learning.agent_interface import EmbedsTasks
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
from metarobot.types import Trials


class RecognitionError(MetarobotError):
    """A run that cannot recognise tasks, or episodes too short to be recognised by."""


@dataclass(frozen=True, kw_only=True)
class RecognitionConfig:
    """Which tasks are played, and how much of them the agent embeds."""

    split: str = "test"
    """Split that tasks are drawn from."""
    tasks: Count = 20
    """Number of tasks."""
    even: bool = False
    """Space them evenly over the training range of the one parameter instead: how finely tasks are
    told apart, without the luck of draws that nearly coincide."""
    transitions: Count = 50
    """What a task is recognised from: so many first transitions of a fresh episode."""
    neighbours: Count = 5
    """Prototypes named for each task, the nearest."""
    support: Count = 5
    """Episodes whose first transitions, as many, make the prototype of each held-out task."""
    queries: Count = 5
    """Fresh episodes of each task to recognise."""
    seed: CountOrZero = 0
    """Seed of tasks and starts."""
    threads: CountOrZero = 0
    """Physics threads on the CPU; 0 takes all there are."""
    sim: str = "cpu"
    """Simulator, ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp)."""
    device: str = "cpu"
    """Where Warp simulates, ``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        check_bounds(self)


def recognise(
    run: Run, config: RecognitionConfig, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Play tasks, recognise them by their first transitions, and return the report as JSON data.

    ``recognised`` is the share of queries whose nearest held-out prototype, made of other episodes,
    is that of their own task. ``new`` is the share judged unknown: farther from all prototypes of
    training tasks than one of these would be from the others.

    Args:
        run: A run of an agent that keeps prototypes.
        config: What is played.
        tick: Called after each of the ``support + queries`` rounds of episodes.

    Raises:
        RecognitionError: An agent without prototypes, or an episode of too few transitions.
    """
    space = run.family.space
    agent = _load_embedding_agent(run, config)
    if config.even:
        tasks = evenly_spaced_tasks(space, config.tasks)
    else:
        tasks = space.sample(config.split, config.tasks, config.seed)
    support, query, faults = _embed_held_out_tasks(agent, run, tasks, config, tick)

    # Prototypes of training tasks: embedding (prototype, embedding), task (prototype, parameter).
    count = len(agent.task_bank())
    prototypes = agent.task_bank().prototype[:count].cpu()
    prototype_tasks = agent.task_bank().task[:count].cpu()
    windows = agent.embedded(config.transitions).cpu()
    held_out_tasks = space.encode(tasks)

    # Distance of every query to every prototype, (query, task, prototype).
    query_distances = distances(query.flatten(0, 1), prototypes)
    query_distances = query_distances.view(len(query), len(tasks), count)

    # A query is recognised if the nearest held-out prototype stands for an equal task.
    found = held_out_tasks[nearest_prototype(query, support)]
    recognised = (found == held_out_tasks).all(-1).double()
    threshold = novelty_threshold(windows, prototypes)
    unknown = (query_distances.amin(2) > threshold).double()

    # How close the windows of each training task lie to its own prototype, on average.
    window_distances = distances(windows.flatten(0, 1), prototypes).view(count, -1, count)
    distance_within = window_distances.mean(1).diagonal()

    centre, directions = _principal_plane(prototypes)
    prototype_xy = torch.einsum("...e,ae->...a", prototypes - centre, directions).tolist()
    query_xy = torch.einsum("...e,ae->...a", query[0] - centre, directions).tolist()

    prototype_values = space.decode(prototype_tasks)
    prototype_rows = []
    for i in range(count):
        prototype_rows.append(
            {
                "task": prototype_values[i],
                "transitions": int(agent.task_bank().lived[i].sum()),
                "within": float(distance_within[i]),
                "xy": prototype_xy[i],
            }
        )

    # The neighbours that are named are those of the first query.
    nearest = query_distances[0].argsort(1)[:, : config.neighbours]
    held_out_rows = []
    for i, task in enumerate(tasks):
        neighbours = []
        for j in nearest[i]:
            neighbours.append(
                {"task": prototype_values[j], "distance": float(query_distances[0, i, j])}
            )
        held_out_rows.append(
            {
                "task": task.as_dict(),
                "recognised": float(recognised[:, i].mean()),
                "new": bool(unknown[0, i]),
                "xy": query_xy[i],
                "neighbours": neighbours,
            }
        )

    # Do distances of embeddings rank as distances of the tasks do?
    pairs = torch.triu_indices(count, count, 1)
    prototype_ranks = rank_correlation(
        distances(prototypes, prototypes)[pairs[0], pairs[1]],
        distances(prototype_tasks, prototype_tasks)[pairs[0], pairs[1]],
    )
    held_out_ranks = rank_correlation(
        query_distances.mean(0).flatten(), distances(held_out_tasks, prototype_tasks).flatten()
    )

    return {
        "family": run.family.name,
        "agent": run.agent,
        "run": run.name,
        "steps": run.steps,
        **asdict(config),
        "threshold": threshold,
        "faults": faults,
        "recognised": _share(recognised),
        "chance": 1.0 / len(torch.unique(held_out_tasks, dim=0)),
        "new": _share(unknown),
        "rank_correlation": {"prototypes": prototype_ranks, "held_out": held_out_ranks},
        "prototypes": prototype_rows,
        "held_out": held_out_rows,
    }


def check_parameter(space: TaskSpace, name: str) -> str:
    """Return the name of a task parameter, the first one for an empty name.

    Raises:
        RecognitionError: The task space has no such parameter.
    """
    names = [param.name for param in space.params if not param.nuisance]
    if name and name not in names:
        raise RecognitionError(
            f"{space.name} has no parameter {name!r}; it has: {', '.join(names)}"
        )
    return name or names[0]


def evenly_spaced_tasks(space: TaskSpace, count: int) -> list[Task]:
    """Return the middles of ``count`` equal parts of the parameter's training range, as tasks.

    Raises:
        RecognitionError: The space has several parameters, or one that is not drawn uniformly.
    """
    param, *others = space.params
    distribution = param.train
    if others or not isinstance(distribution, Uniform):
        raise RecognitionError(
            f"{space.name} is not one parameter drawn uniformly: its tasks have no even spacing"
        )
    width = distribution.high - distribution.low
    tasks = []
    for i in range(count):
        value = distribution.low + width * (i + 0.5) / count
        tasks.append(space.task(**{param.name: value}))
    return tasks


def _load_embedding_agent(run: Run, config: RecognitionConfig) -> EmbedsTasks:
    """Load the agent of a run; raise if it does not keep prototypes, or too few."""
    agent = run.load_agent()
    if not isinstance(agent, EmbedsTasks):
        raise RecognitionError(
            f"{run.folder} keeps no prototypes: its agent is {run.agent!r}; train one as prototype"
        )
    if config.neighbours > len(agent.task_bank()):
        raise RecognitionError(
            f"{run.folder} keeps {len(agent.task_bank())} prototypes, "
            f"fewer than {config.neighbours} neighbours"
        )
    return agent


def _embed_held_out_tasks(
    agent: Any,
    run: Run,
    tasks: Sequence[Task],
    config: RecognitionConfig,
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor, int]:
    """Play fresh episodes of held-out tasks and embed their first transitions.

    Returns:
        Prototypes of the tasks ``(task, embedding)``; of other episodes the queries ``(query, task,
        embedding)``; the number of episodes that faulted, all after these transitions.

    Raises:
        EvaluationError: Actions that are not finite, or too many faulted episodes.
    """
    env = make_env(run.family, tasks, sim=config.sim, device=config.device, threads=config.threads)
    agent.to(env.device)
    embeddings = []
    faults = 0
    for k in range(config.support + config.queries):
        trials = collect(agent, env, tasks, episodes=1, seed=config.seed + k, explore=False)
        check_actions(trials, run.name)
        faults += int(faulted_episodes(trials).sum())
        embeddings.append(_embed_start(agent, trials, tasks, config))
        tick()
    z = torch.stack(embeddings)
    check_fault_count(faults, faults / z[..., 0].numel(), run.name)
    return z[: config.support].mean(0), z[config.support :], faults


def _embed_start(
    agent: EmbedsTasks, trials: Trials, tasks: Sequence[Task], config: RecognitionConfig
) -> Tensor:
    """Embed the first transitions of one episode of every task, ``(task, embedding)``."""
    episode = trials.episodes[0]
    lengths = episode.valid.sum(0)
    shortest = int(lengths.min())
    if shortest < config.transitions:
        task = tasks[int(lengths.argmin())]
        raise RecognitionError(
            f"{task.describe()}: the episode ended after {shortest} transitions; ask for fewer"
        )
    z: Tensor = agent.embed(episode, config.transitions)
    if not bool(z.isfinite().all()):
        raise RecognitionError("embeddings are not finite: there is nothing to recognise tasks by")
    return z.cpu()


def _share(x: Tensor) -> dict[str, Any]:
    """Return the mean of ``(query, task)``, and its interval over tasks."""
    task_means = x.mean(0, keepdim=True).numpy()
    return {"mean": float(x.mean()), "ci95": bootstrap_interval(task_means, np.mean)}


def _principal_plane(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of points and the two directions in which they vary most (Pearson 1901).

    Takes points ``(n, embedding)``; the directions are ``(2, embedding)``.
    """
    centre = z.mean(0)
    _, _, directions = torch.linalg.svd(z - centre, full_matrices=False)
    directions = directions[:2]
    # A singular vector's sign is arbitrary: choose the one whose components sum to more than 0.
    signs = directions.sum(1, keepdim=True).sign()
    return centre, directions * signs
