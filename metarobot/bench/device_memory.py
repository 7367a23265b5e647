"""Memory of a device against the number of worlds, with a training iteration in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, cast

import torch

from metarobot.bench.harness import device_name
from metarobot.env.device import DeviceEnv, bytes_per_world, check_memory
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.optimiser_state import move_to_device
from metarobot.sim.warp import WarpSim, free_memory
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner

FIRST_WORLDS = 1024
"""Number of worlds to begin with."""
MINIBATCHES = 8
"""Minibatches of the training iteration, the fewest worlds that can be measured."""


def bench_memory(family: Family, *, worlds: int, device: str) -> dict[str, Any]:
    """Measure the memory of ever twice as many worlds, with an iteration of RL² in them.

    It ends at ``worlds``, or where the memory does; the report says which. On the CPU only the
    arrays of the physics are counted.

    Args:
        family: What is simulated.
        worlds: Number of worlds to go up to.
        device: Warp's device, ``cpu`` or ``cuda``.

    Raises:
        MetarobotError: Too few worlds, or a family that Warp cannot run here.
    """
    if worlds < MINIBATCHES:
        raise MetarobotError(f"worlds must be at least {MINIBATCHES}, not {worlds}")
    # Raises where nothing can run at all: that would be no end of the memory.
    bytes_per_world(family, device)

    rows: list[dict[str, float]] = []
    end = ""
    for count in _doubled_up_to(worlds):
        try:
            check_memory(family, count, device)
            rows.append(_measure_iteration(family, count, device))
        except (MetarobotError, torch.OutOfMemoryError) as e:
            reason = str(e).partition(". ")[0]
            end = f"{count:,} worlds: {reason}"
            break
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"family": family.name, "device": device_name(device), "rows": rows, "end": end}


def _doubled_up_to(most: int) -> Iterator[int]:
    count = min(most, FIRST_WORLDS)
    while count <= most:
        yield count
        count *= 2


def _measure_iteration(family: Family, worlds: int, device: str) -> dict[str, float]:
    """Collect and learn from one trial in so many worlds; return the memory taken, GB."""
    free_before = free_memory(device)
    config = agents.get("rl2").config(worlds=worlds, epochs=1, minibatches=MINIBATCHES)
    learner = build_learner("rl2", config, family, 0)
    move_to_device(learner, device)
    tasks = family.space.sample("train", worlds, 0)
    env = DeviceEnv(family, tasks, device=device)
    physics_bytes = cast(WarpSim, env.sim).bytes
    environment_bytes = free_before - free_memory(device)

    trials = collect(learner.agent, env, tasks, episodes=config.episodes, seed=0)
    learner.update(trials, 0.0, 0)
    training_bytes = free_before - free_memory(device)
    return {
        "worlds": worlds,
        "physics_gb": physics_bytes / 1e9,
        "environment_gb": environment_bytes / 1e9,
        "training_gb": training_bytes / 1e9,
    }
