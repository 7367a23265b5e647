"""Where trials are collected, and which training tasks each iteration gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from metarobot.env.base import Env
from metarobot.env.factory import make_env
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

POOL = 4096
"""Training tasks that have models of their own on the device, by default."""


@dataclass(frozen=True)
class TaskSource:
    """The worlds of a training run, and the tasks they are given."""

    env: Env
    sample_tasks: Callable[[int], list[Task]]
    """Iteration -> its tasks, keyed by the seed of the run."""
    overflow_metrics: Callable[[], dict[str, float]]
    """Metrics: in how many worlds the physics lost contacts since the last call, as buffers were
    too small. Empty on the CPU, which loses none."""


def make_task_source(
    family: Family,
    worlds: int,
    rollouts: int,
    *,
    seed: int,
    sim: str,
    device: str,
    pool: int,
    threads: int,
) -> TaskSource:
    """Build the worlds of a training run, ``rollouts`` of each task.

    On the CPU every iteration draws new tasks. On a device models are uploaded once and kept, so
    where tasks have models of their own, ``pool`` of them are drawn at the beginning, keyed by the
    seed, and each iteration takes some of these.

    Args:
        family: The task family.
        worlds: Number of worlds, a multiple of ``rollouts``.
        rollouts: Worlds of one task.
        seed: Seed of the run.
        sim: ``cpu`` or ``warp``, see ``make_env``.
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        pool: Number of tasks in the pool; 0 takes ``POOL``.
        threads: Threads of MuJoCo on the CPU; 0 takes all there are.
    """
    space = family.space
    tasks = worlds // rollouts

    def sample_new(iteration: int) -> list[Task]:
        return space.sample("train", tasks, [seed, iteration])

    if sim == "cpu":
        env = make_env(family, space.sample("train", worlds), threads=threads)
        return TaskSource(env, sample_new, dict)

    # Where all tasks share one model there is nothing to upload, so no pool is needed.
    if TaskModels(family).shared:
        pooled = []
        sample = sample_new
    else:
        pooled = space.sample("train", pool or POOL, seed)

        def sample(iteration: int) -> list[Task]:
            # Whole permutations one after the other, so that all tasks come equally often.
            rng = np.random.Generator(np.random.PCG64([seed, iteration]))
            rounds = -(-tasks // len(pooled))
            order = np.concatenate([rng.permutation(len(pooled)) for _ in range(rounds)])
            return [pooled[k] for k in order[:tasks]]

    first = [task for task in sample(0) for _ in range(rollouts)]
    env = make_env(family, first, sim=sim, device=device, pool=pooled)
    return TaskSource(env, sample, lambda: _overflow_metrics(env))


def _overflow_metrics(env: Env) -> dict[str, float]:
    """Count, as metrics, the worlds that lost contacts since the last call."""
    from metarobot.sim.warp import WarpSim

    overflows = cast(WarpSim, env.sim).overflows()
    metrics = {"sim/lost_contacts": float(sum(overflows.values()))}
    for buffer, worlds in overflows.items():
        metrics[f"sim/lost_{buffer}"] = float(worlds)
    return metrics
