"""Speed of PEARL's gradient steps against their matrix products, and of its sampling."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from metarobot.bench.harness import (
    Round,
    check_sizes,
    measure_rounds,
    median,
    median_ratio,
    timed,
    usable_threads,
)
from metarobot.env.base import Env
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import Family
from metarobot.threads_and_memory import keep_freed_memory, restored_torch_threads
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner

GRADIENT_STEPS = 50
"""Gradient steps of a round."""


def bench_pearl(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure PEARL's learning against bare matrix products, and its sampling against RL²'s.

    The products are those of its gradient steps, forward and backward, on as many threads.

    Args:
        family: What is simulated.
        worlds: Number of worlds.
        seconds: How long to measure, at least.
        threads: CPU threads; 0 takes all there are.
        show: Whether to show a progress bar.

    Raises:
        MetarobotError: No worlds, or no time.
    """
    check_sizes(worlds, seconds)
    keep_freed_memory()  # as training does
    threads = usable_threads(threads)

    tasks = family.space.sample("train", worlds, 0)
    env = Env(family, tasks, threads=threads)
    config = agents.get("pearl").config(worlds=worlds, gradient_steps=GRADIENT_STEPS)
    learner: Any = build_learner("pearl", config, family, 0)
    rl2_learner = build_learner("rl2", agents.get("rl2").config(), family, 0)
    play = partial(collect, env=env, tasks=tasks, episodes=config.episodes, seed=0)
    iteration = 0

    def measure() -> Round:
        nonlocal iteration
        torch.set_num_threads(1)  # as training collects
        trials, sampling_s = timed(lambda: play(learner.agent))
        _, rl2_sampling_s = timed(lambda: play(rl2_learner.agent))

        torch.set_num_threads(threads)
        _, learning_s = timed(lambda: learner.update(trials, 0.0, iteration))
        _, products_s = timed(lambda: _multiply(learner.products(), GRADIENT_STEPS, threads))
        iteration += 1
        return {
            "sampling": trials.steps() / sampling_s,
            "rl2": trials.steps() / rl2_sampling_s,
            "learning": GRADIENT_STEPS / learning_s,
            "products": GRADIENT_STEPS / products_s,
        }

    with restored_torch_threads():
        rounds = measure_rounds(measure, seconds, show=show)

    gradient_steps_per_s = median(rounds, "learning")
    return {
        "family": family.name,
        "worlds": worlds,
        "threads": threads,
        "rounds": len(rounds),
        "gradient_steps_per_s": gradient_steps_per_s,
        "states_per_s": gradient_steps_per_s * config.tasks * config.batch,
        "products_per_s": median(rounds, "products"),
        "ratio": median_ratio(rounds, "learning", "products"),
        "sampling_steps_per_s": median(rounds, "sampling"),
        "rl2_sampling_steps_per_s": median(rounds, "rl2"),
        "sampling_ratio": median_ratio(rounds, "sampling", "rl2"),
    }


def _multiply(shapes: Sequence[tuple[int, int, int]], times: int, threads: int) -> None:
    """Multiply matrices of shapes (rows, inner, columns), each thread its share of the rows."""

    def multiply_share(_: int) -> None:
        pairs = []
        for rows, inner, columns in shapes:
            share = -(-rows // threads)  # rounded up
            pairs.append((torch.ones(share, inner), torch.ones(inner, columns)))
        for _ in range(times):
            for left, right in pairs:
                torch.mm(left, right)

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(multiply_share, range(threads)))
