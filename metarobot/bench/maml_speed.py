"""Seconds of the parts of a MAML-TRPO iteration, with ``vmap`` over tasks and with a loop."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch
from mujoco import batch

from metarobot.bench.harness import Round, measure_rounds, median, timed, usable_threads
from metarobot.bench.simulation_speed import random_actions, run_engine
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.meta_gradient import loop_over_tasks
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.threads_and_memory import keep_freed_memory, restored_torch_threads
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner

ROLLOUTS = 20
"""Rollouts of each task, as in Finn et al. (2017)."""
SETTINGS = {"rollouts": ROLLOUTS, "width": 64, "episodes": 2, "cg_steps": 10}
"""Settings of MAML: a policy of two layers of 64, a trial of one inner step."""
MAPPINGS = ("vmap", "loop")
"""How the tasks of a batch are computed: together by ``vmap``, or one after another."""
PARTS = (
    "sampling_s",
    "inner_step_s",
    "outer_update_s",
    "total_s",
    "sampling_steps_per_s",
    "engine_steps_per_s",
    "ratio",
)
"""What is measured of an iteration."""


def bench_maml(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure the seconds of the parts of a MAML-TRPO iteration.

    A round is the bare engine, MAML, and MAML with a Python loop over tasks in place of ``vmap``.

    Args:
        family: What is simulated.
        worlds: Number of worlds, a multiple of the 20 rollouts of a task.
        seconds: How long to measure, at least.
        threads: CPU threads; 0 takes all there are.
        show: Whether to show a progress bar.

    Raises:
        MetarobotError: Another number of worlds, or no time.
    """
    if worlds < 1 or worlds % ROLLOUTS:
        raise MetarobotError(
            f"worlds must be a multiple of {ROLLOUTS}, the rollouts a task, not {worlds}"
        )
    if seconds <= 0:
        raise MetarobotError(f"seconds must be positive, not {seconds:g}")
    keep_freed_memory()  # as training does
    threads = usable_threads(threads)

    config = agents.get("maml").config(worlds=worlds, **SETTINGS)
    learner = build_learner("maml", config, family, 0)
    tasks = family.space.sample("train", worlds // ROLLOUTS, 0)
    env = Env(family, [task for task in tasks for _ in range(ROLLOUTS)], threads=threads)

    engine = batch.Batch(env.model(tasks[0]), worlds, threads)
    engine.set_models([env.model(task) for task in env.tasks])
    actions = random_actions(family.horizon, worlds, env.act_dim)

    def measure() -> Round:
        engine.reset()
        _, engine_s = timed(lambda: run_engine(engine, actions, family.substeps))
        engine_rate = family.horizon * worlds / engine_s
        result = {}
        by_vmap = _measure_iteration(learner, env, tasks, threads, engine_rate)
        with loop_over_tasks():
            by_loop = _measure_iteration(learner, env, tasks, threads, engine_rate)
        for mapping, parts in zip(MAPPINGS, (by_vmap, by_loop), strict=True):
            for part, value in parts.items():
                result[f"{mapping} {part}"] = value
        return result

    with restored_torch_threads():
        # An iteration takes seconds: one after the warm-up will do.
        rounds = measure_rounds(measure, seconds, least_rounds=1, show=show)

    report: dict[str, Any] = {
        "family": family.name,
        "tasks": len(tasks),
        "rollouts": ROLLOUTS,
        "horizon": family.horizon,
        "rounds": len(rounds),
        "threads": threads,
        "peak_memory_mb": _peak_memory_mb(),
    }
    for mapping in MAPPINGS:
        report[mapping] = {part: median(rounds, f"{mapping} {part}") for part in PARTS}
    return report


def _measure_iteration(
    learner: Any, env: Env, tasks: Sequence[Task], threads: int, engine_rate: float
) -> Round:
    """Measure an iteration's parts, as training runs them; the weights are restored."""
    torch.set_num_threads(1)
    trials, collecting_s = timed(
        lambda: collect(learner.agent, env, tasks, episodes=2, seed=0, rollouts=ROLLOUTS)
    )
    # Collecting includes the inner step between the episodes. It is measured by itself once more.
    context = learner.agent.begin(len(tasks))
    _, inner_step_s = timed(lambda: learner.agent.adapt(context, trials.episodes[0]))
    sampling_s = collecting_s - inner_step_s

    torch.set_num_threads(threads)
    before = learner.state()
    _, outer_update_s = timed(lambda: learner.update(trials, 0.0, 0))
    learner.load(before)

    sampling_rate = trials.steps() / sampling_s
    return {
        "sampling_s": sampling_s,
        "inner_step_s": inner_step_s,
        "outer_update_s": outer_update_s,
        "total_s": collecting_s + outer_update_s,
        "sampling_steps_per_s": sampling_rate,
        "engine_steps_per_s": engine_rate,
        "ratio": sampling_rate / engine_rate,
    }


def _peak_memory_mb() -> float:
    """Return the peak resident memory of this process, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / (2**10 if sys.platform == "linux" else 2**20)
