"""Speed of the environment against the bare engine, of MAML's parts, PEARL and agents that sample;
in turns.
"""

from __future__ import annotations

import copy
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, cast

import mujoco
import numpy as np
import torch
from mujoco import batch
from rich.progress import Progress
from torch import Tensor

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents, comparable_agents
from metarobot.learning.meta_gradient import loop_over_tasks
from metarobot.resources import keep_freed_memory
from metarobot.sim.cpu import CpuSim, selected_ids
from metarobot.sim.protocol import WorldSelection
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner


def bench_sim(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure control steps a second of ``Env.step`` and of a bare ``mujoco.batch.Batch``.

    Both live the same physics bit for bit: the same models, one object of its own in each world,
    the same substeps, threads, random controls, and the same worlds put back to the same starts
    when the environment resets them. A round of one is an episode; rounds alternate.
    """
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")
    threads = threads or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    env = Env(family, family.space.sample("train", worlds), threads=threads, make_sim=_Recorder)
    recorder = cast(_Recorder, env.sim)
    models = [copy.copy(env.model(t)) for t in env.tasks]
    env.sim.set_models(models)
    env.reset(0)
    engine = batch.Batch(models[0], worlds, threads)
    engine.set_models(models)
    shape = (family.horizon, worlds, env.act_dim)
    actions = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    recorder.settle()
    _replay(engine, recorder.tape)
    rounds: dict[str, list[float]] = {"env": [], "engine": []}
    began = time.perf_counter()
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        while len(rounds["env"]) < 3 or time.perf_counter() - began < seconds:
            recorder.tape.clear()
            rounds["env"].append(_rate(lambda: _drive_env(env, actions), actions))
            recorder.settle()
            rounds["engine"].append(_rate(lambda: _replay(engine, recorder.tape), actions))
            if not np.array_equal(engine.bind("qpos"), env.state.qpos.numpy(), equal_nan=True):
                raise MetarobotError(
                    f"{family.name}: the bare engine did not live the same physics; nothing to compare"
                )
            bar.update(task, completed=time.perf_counter() - began)
    torch.set_num_threads(before)
    return _report(family, worlds, threads, rounds)


def _drive_env(env: Env, actions: Tensor) -> None:
    for action in actions:
        env.step(action)


class _Recorder(CpuSim):
    """The CPU backend, taping what it is told: the drives' targets of each step, and each start."""

    def __init__(self, models: Sequence[mujoco.MjModel], threads: int = 0) -> None:
        super().__init__(models, threads)
        self.tape: list[_Told] = []
        self._ctrl, self._act = self.bind("ctrl"), self.bind("act")

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        self.settle()
        self.tape.append(_Told(substeps, ctrl=self._ctrl.numpy().copy()))
        return super().step(substeps, rows)

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        self.tape.append(_Told(0, selected_ids(rows), {"qpos": qpos.numpy(), "qvel": qvel.numpy()}))
        super().reset(qpos, qvel, rows)

    def settle(self) -> None:
        """Note where the drives of the last worlds that were reset have been put since."""
        for told in reversed(self.tape):
            if told.substeps:
                break
            cast(dict[str, Any], told.start)["act"] = self._act[_rows(told.ids)].numpy().copy()


class _Told(NamedTuple):
    substeps: int
    """Zero for a start."""
    ids: Sequence[int] | None = None
    start: dict[str, Any] | None = None
    ctrl: Any = None


def _rows(ids: Sequence[int] | None) -> Any:
    return slice(None) if ids is None else list(ids)


def _replay(engine: batch.Batch, tape: Iterable[_Told]) -> None:
    ctrl = engine.bind("ctrl")
    for told in tape:
        if told.substeps:
            ctrl[:] = told.ctrl
            engine.step(nstep=told.substeps)
        else:
            engine.reset(told.ids, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
            for name, value in cast(dict[str, Any], told.start).items():
                engine.bind(name)[_rows(told.ids)] = value


def _drive_engine(engine: batch.Batch, actions: Tensor, substeps: int) -> None:
    _replay(engine, [_Told(substeps, ctrl=a) for a in actions.numpy()])


def _rate(drive: Callable[[], None], actions: Tensor) -> float:
    began = time.perf_counter()
    drive()
    return actions.shape[0] * actions.shape[1] / (time.perf_counter() - began)


def _report(
    family: Family, worlds: int, threads: int, rounds: dict[str, list[float]]
) -> dict[str, Any]:
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


MAML_TASKS, MAML_ROLLOUTS = 40, 20


def bench_maml(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure the seconds of MAML-TRPO's parts at 40 tasks x 20 rollouts and a policy of 2 x 64,
    for a trial of 2.

    Rounds of the bare engine, of MAML, and of MAML with a Python loop over tasks in place of
    ``vmap`` take turns.
    """
    if worlds < 1 or worlds % MAML_ROLLOUTS:
        raise MetarobotError(
            f"worlds must be a multiple of {MAML_ROLLOUTS}, the rollouts a task, not {worlds}"
        )
    if seconds <= 0:
        raise MetarobotError(f"seconds must be positive, not {seconds:g}")
    keep_freed_memory()  # as training does
    threads = threads or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    config = agents.get("maml").config(
        worlds=worlds, rollouts=MAML_ROLLOUTS, width=64, episodes=2, cg_steps=10
    )
    learner = build_learner("maml", config, family, 0)
    tasks = family.space.sample("train", worlds // MAML_ROLLOUTS, 0)
    env = Env(family, [t for t in tasks for _ in range(MAML_ROLLOUTS)], threads=threads)
    engine = batch.Batch(env.model(tasks[0]), worlds, threads)
    engine.set_models([env.model(t) for t in env.tasks])
    actions = (
        torch.rand(
            (family.horizon, worlds, env.act_dim), generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )
    rounds: list[dict[str, dict[str, float]]] = []
    began = time.perf_counter()
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        while len(rounds) < 2 or time.perf_counter() - began < seconds:
            engine.reset()
            rate = _rate(lambda: _drive_engine(engine, actions, family.substeps), actions)
            measured = {"vmap": _maml_round(learner, env, tasks, threads, rate)}
            with loop_over_tasks():
                measured["loop"] = _maml_round(learner, env, tasks, threads, rate)
            rounds.append(measured)
            bar.update(task, completed=time.perf_counter() - began)
    torch.set_num_threads(before)
    rounds = rounds[1:]  # the first warms up
    parts = {
        how: {k: statistics.median(r[how][k] for r in rounds) for k in rounds[0][how]}
        for how in ("vmap", "loop")
    }
    # Linux counts in KiB, macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**10 if sys.platform == "linux" else 2**20
    )
    sizes = {
        "tasks": len(tasks),
        "rollouts": MAML_ROLLOUTS,
        "horizon": family.horizon,
        "rounds": len(rounds),
    }
    return {"family": family.name, **sizes, "threads": threads, "peak_memory_mb": peak, **parts}


def _maml_round(
    learner: Any, env: Env, tasks: Any, threads: int, engine_rate: float
) -> dict[str, float]:
    """Return the seconds of an iteration's parts, measured as training runs them."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    trials = collect(learner.agent, env, tasks, episodes=2, seed=0, rollouts=MAML_ROLLOUTS)
    collected = time.perf_counter() - began
    context = learner.agent.begin(len(tasks))
    began = time.perf_counter()
    learner.agent.adapt(context, trials.episodes[0])
    inner = time.perf_counter() - began
    torch.set_num_threads(threads)
    state = learner.state()
    began = time.perf_counter()
    learner.update(trials, 0.0, 0)
    outer = time.perf_counter() - began
    learner.load(state)
    sampling = collected - inner
    rate = trials.steps() / sampling
    times = {
        "sampling_s": sampling,
        "inner_step_s": inner,
        "outer_update_s": outer,
        "total_s": collected + outer,
    }
    return {
        **times,
        "sampling_steps_per_s": rate,
        "engine_steps_per_s": engine_rate,
        "ratio": rate / engine_rate,
    }


def bench_pearl(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure PEARL's gradient steps a second against their bare matrix products, and its sampling
    against RL²'s.

    The products are of the same shapes, forward and backward, on as many threads. All four take
    turns.
    """
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")
    keep_freed_memory()  # as training does
    threads = threads or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    tasks = family.space.sample("train", worlds, 0)
    env = Env(family, tasks, threads=threads)
    config = agents.get("pearl").config(worlds=worlds, gradient_steps=50)
    learner: Any = build_learner("pearl", config, family, 0)
    rival = build_learner("rl2", agents.get("rl2").config(), family, 0)
    play = partial(collect, env=env, tasks=tasks, episodes=config.episodes, seed=0)
    rounds: dict[str, list[float]] = {"sampling": [], "rl2": [], "learning": [], "products": []}
    began = time.perf_counter()
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        while len(rounds["products"]) < 3 or time.perf_counter() - began < seconds:
            torch.set_num_threads(1)
            trials, took = _timed(play, learner.agent)
            rounds["sampling"].append(trials.steps() / took)
            rounds["rl2"].append(trials.steps() / _timed(play, rival.agent)[1])
            torch.set_num_threads(threads)
            learning = _timed(learner.update, trials, 0.0, len(rounds["learning"]))[1]
            rounds["learning"].append(config.gradient_steps / learning)
            bare = _timed(_multiply, learner.products(), config.gradient_steps, threads)[1]
            rounds["products"].append(config.gradient_steps / bare)
            bar.update(task, completed=time.perf_counter() - began)
    torch.set_num_threads(before)
    rates = {k: statistics.median(v[1:]) for k, v in rounds.items()}  # the first warms up
    return {
        "family": family.name,
        "worlds": worlds,
        "threads": threads,
        "rounds": len(rounds["products"]) - 1,
        "gradient_steps_per_s": rates["learning"],
        "states_per_s": rates["learning"] * config.tasks * config.batch,
        "products_per_s": rates["products"],
        "ratio": _median_ratio(rounds["learning"], rounds["products"]),
        "sampling_steps_per_s": rates["sampling"],
        "rl2_sampling_steps_per_s": rates["rl2"],
        "sampling_ratio": _median_ratio(rounds["sampling"], rounds["rl2"]),
    }


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    done = work(*arguments)
    return done, time.perf_counter() - began


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))


def _multiply(products: list[tuple[int, int, int]], times: int, threads: int) -> None:
    """Multiply matrices of these shapes (rows, inner, columns), each thread its share of the
    rows.
    """

    def share(_: int) -> None:
        pairs = [(torch.ones(-(-n // threads), a), torch.ones(a, b)) for n, a, b in products]
        for _ in range(times):
            for x, w in pairs:
                torch.mm(x, w)

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(share, range(threads)))


def bench_agents(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure environment steps a second while each kind of agent lives its trials, untrained;
    rounds take turns.

    The ratio is to RL2's rate in the same round, with as many threads as training collects with.
    """
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")
    keep_freed_memory()  # as training does
    threads, before = threads or len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(1)
    livers = {name: _Liver(name, family, worlds, threads) for name in comparable_agents()}
    rounds: list[dict[str, float]] = []
    began = time.perf_counter()
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        while len(rounds) < 3 or time.perf_counter() - began < seconds:
            rounds.append({name: liver.rate() for name, liver in livers.items()})
            bar.update(task, completed=time.perf_counter() - began)
    torch.set_num_threads(before)
    rounds = rounds[1:]  # the first warms up
    rates = {
        name: {
            "worlds": liver.env.worlds,
            "steps_per_s": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(r[name] / r["rl2"] for r in rounds),
        }
        for name, liver in livers.items()
    }
    return {"family": family.name, "threads": threads, "rounds": len(rounds), "agents": rates}


class _Liver:
    """An untrained agent and its worlds, at least so many."""

    def __init__(self, name: str, family: Family, worlds: int, threads: int) -> None:
        config = agents.get(name).config()
        self.episodes, self.rollouts = config.episodes, getattr(config, "rollouts", 1)
        self.agent = build_learner(name, config, family, 0).agent
        self.tasks = family.space.sample("train", -(-worlds // self.rollouts), 0)
        self.env = Env(
            family, [t for t in self.tasks for _ in range(self.rollouts)], threads=threads
        )

    def rate(self) -> float:
        """Live a trial in every task; return environment steps a second."""
        play = partial(collect, episodes=self.episodes, seed=0, rollouts=self.rollouts)
        trials, took = _timed(play, self.agent, self.env, self.tasks)
        return float(trials.steps() / took)
