"""Speed of the environment against the bare engine, both measured in turns in one run."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from mujoco import batch
from rich.progress import Progress

from metarobot.env import Env, Family
from metarobot.types import MetarobotError


def bench_sim(family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True) -> dict[str, Any]:
    """Measure control steps a second of ``Env.step`` and of a bare ``mujoco.batch.Batch``.

    Both run the same models, one object of its own in each world, with the same substeps, threads and random controls.
    A round of one is an episode, which for the environment ends in resetting every world; rounds alternate.
    """
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")
    threads = threads or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    env = Env(family, family.space.sample("train", worlds), threads=threads)
    models = [copy.copy(env.model(t)) for t in env.tasks]
    env.sim.set_models(models)
    env.reset(0)
    engine = batch.Batch(models[0], worlds, threads)
    engine.set_models(models)
    shape = (family.horizon, worlds, env.act_dim)
    actions = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounds: dict[str, list[float]] = {"env": [], "engine": []}
    began = time.perf_counter()
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        while len(rounds["env"]) < 3 or time.perf_counter() - began < seconds:
            env.reset()
            rounds["env"].append(_rate(lambda: _drive_env(env, actions), actions))
            engine.reset()
            rounds["engine"].append(_rate(lambda: _drive_engine(engine, actions, family.substeps), actions))
            bar.update(task, completed=time.perf_counter() - began)
    torch.set_num_threads(before)
    return _report(family, worlds, threads, rounds)


def _drive_env(env: Env, actions: torch.Tensor) -> None:
    for action in actions:
        env.step(action)


def _drive_engine(engine: batch.Batch, actions: torch.Tensor, substeps: int) -> None:
    ctrl = engine.bind("ctrl")
    for action in actions.numpy():
        ctrl[:] = action
        engine.step(nstep=substeps)


def _rate(drive: Callable[[], None], actions: torch.Tensor) -> float:
    began = time.perf_counter()
    drive()
    return actions.shape[0] * actions.shape[1] / (time.perf_counter() - began)


def _report(family: Family, worlds: int, threads: int, rounds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = sorted(e / b for e, b in zip(rounds["env"], rounds["engine"], strict=True))
    env, engine = (sorted(rounds[k])[len(rounds[k]) // 2] for k in ("env", "engine"))
    return {
        "family": family.name,
        "worlds": worlds,
        "threads": threads,
        "substeps": family.substeps,
        "rounds": len(ratios),
        "steps_per_s": env,
        "engine_steps_per_s": engine,
        "ratio": ratios[len(ratios) // 2],
    }
