"""Where trials are lived: on which simulator and device, and which training tasks an iteration
gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarobot.env.base import Env
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

POOL = 4096
"""Training tasks that have models of their own on the device, if nothing else is said."""


@dataclass(frozen=True)
class TaskSource:
    """The worlds of a training, and the tasks they are given."""

    env: Env
    deal: Callable[[int], list[Task]]
    """Iteration -> its tasks, keyed by the training's seed."""
    lost: Callable[[], dict[str, float]]
    """Says, as metrics, in how many worlds the physics lost contacts for want of room since it was
    last asked."""


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
    """Build the worlds of a training, ``rollouts`` of each task.

    On the CPU every iteration draws new tasks. On a device models are kept there, so where tasks
    have models of their own, all are drawn once, ``pool`` of them keyed by the seed, and each
    iteration deals some out.
    """
    tasks, space = worlds // rollouts, family.space

    def fresh(i: int) -> list[Task]:
        return space.sample("train", tasks, [seed, i])

    if sim == "cpu":
        return TaskSource(Env(family, space.sample("train", worlds), threads=threads), fresh, dict)
    if TaskModels(family).shared:
        env = _on_device(family, fresh(0), rollouts, device, [])
        return TaskSource(env, fresh, lambda: _lost(env))
    drawn = space.sample("train", pool or POOL, seed)

    def dealt(i: int) -> list[Task]:
        rng = np.random.Generator(np.random.PCG64([seed, i]))
        rounds = -(-tasks // len(drawn))
        order = np.concatenate([rng.permutation(len(drawn)) for _ in range(rounds)])
        return [drawn[k] for k in order[:tasks]]

    env = _on_device(family, dealt(0), rollouts, device, drawn)
    return TaskSource(env, dealt, lambda: _lost(env))


def _on_device(
    family: Family, tasks: list[Task], rollouts: int, device: str, pool: list[Task]
) -> Env:
    from metarobot.env.device import DeviceEnv

    return DeviceEnv(family, [t for t in tasks for _ in range(rollouts)], device=device, pool=pool)


def _lost(env: Any) -> dict[str, float]:
    lost: dict[str, int] = env.sim.lost()
    return {
        "sim/lost_contacts": float(sum(lost.values())),
        **{f"sim/lost_{k}": float(n) for k, n in lost.items()},
    }
