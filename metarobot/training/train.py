"""Meta-training: sample tasks, collect trials, update, log, save; resumable bit for bit.

Every iteration's tasks, starts, noise and minibatches are keyed by (seed, iteration), so the state
of a run is its learner and two counters: what a checkpoint holds is all there is.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import mujoco
import numpy as np
import torch

import metarobot
from metarobot.env import factory
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Learner, TrainingStep, agents
from metarobot.learning.optimiser_state import move_to_device
from metarobot.resources import keep_freed_memory, restored_torch_threads
from metarobot.tasks.family import Family, family_on
from metarobot.training import task_sampling as worlds
from metarobot.training.collect import collect
from metarobot.training.config import CHANGEABLE_ON_RESUME, TrainConfig, check_config
from metarobot.training.demonstrations import read_demonstrations
from metarobot.training.metrics_log import MetricsLog
from metarobot.training.run_folder import (
    CheckpointError,
    Run,
    build_learner,
    create_run,
    extend_run,
    open_run,
    save_checkpoint,
)
from metarobot.types import Trials


def start_run(
    config: TrainConfig, agent_config: Any, out: Path, say: Callable[[str], None] = lambda _: None
) -> Run:
    """Make the run folder of a new training; ``say`` is told in a line what simulates, where there
    is a choice.
    """
    if config.robot and Path(config.robot).exists():
        config = replace(config, robot=str(Path(config.robot).resolve()))
    if config.demos:
        config = replace(config, demos=str(Path(config.demos).resolve()))
    check_config(config)
    for name, value in asdict(agent_config).items():
        least = 0 if name in ("inner_steps", "guess") else 1
        if type(value) is int and value < least:
            raise MetarobotError(f"{name} must be at least {least}, not {value}")
        if type(value) is float and not 0 <= value < math.inf:
            raise MetarobotError(f"{name} must be a finite number of at least 0, not {value}")
    versions = {
        "metarobot": metarobot.__version__,
        "mujoco": mujoco.__version__,
        "torch": torch.__version__,
    }
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    plain = {
        **asdict(config),
        "agent_config": asdict(agent_config),
        "versions": versions,
        "machine": _machine(),
    }
    family = family_on(config.family, config.robot)
    config = _simulated(config, family, agent_config, say)
    plain |= {"sim": config.sim}
    if getattr(agent_config, "teach", 0) > 0:
        Env(family, family.space.sample("train", 1)).teacher_action()
    _begin(build_learner(config.agent, agent_config, family, config.seed), family, config)
    if config.demos:
        _imitated(family, agent_config.worlds, agent_config.rollouts, config)(0)
    return create_run(out, plain)


def _simulated(
    config: TrainConfig, family: Family, agent_config: Any, say: Callable[[str], None]
) -> TrainConfig:
    """Fill in what simulates, and raise if it cannot have so many worlds."""
    if config.demos or agents.get(config.agent).fit is not None:
        return replace(config, sim="cpu")
    sim, why = factory.choose_simulator(family, config.sim, config.device)
    if config.sim or config.device != "cpu":
        say(why)
    factory.check_simulator(family, sim, config.device, agent_config.worlds)
    return replace(config, sim=sim)


def _begin(learner: Learner, family: Family, config: TrainConfig) -> None:
    """Let an untrained learner take the memory it needs, and begin as the policy of ``config.init``
    acts, if given.
    """
    getattr(learner, "reserve_memory", lambda: None)()
    if not config.init:
        return
    source, warm_start = open_run(config.init), getattr(learner, "warm_start", None)
    if source.agent not in ("ppo", "blind"):
        raise MetarobotError(
            f"init needs a policy trained as ppo or blind; {config.init} was trained as {source.agent}"
        )
    if warm_start is None:
        raise MetarobotError(
            f"agent {config.agent!r} cannot begin as another policy; rl2, ppo, blind and oracle can"
        )
    if source.family.observations != family.observations:
        raise MetarobotError(
            f"init: {source.family.name}, which {config.init} knows, is observed otherwise than {family.name}"
        )
    warm_start(source.load_agent())


def reopen_run(
    config: TrainConfig, agent_config: Any, out: Path, say: Callable[[str], None] = lambda _: None
) -> Run:
    """Open a run to continue it, refusing settings other than those it was started with, but for
    more steps.

    A run that is made longer takes up its schedules where they now stand. It may move to another
    device or simulator, which ``say`` is told in a line.
    """
    run = open_run(out)
    asked = {**asdict(config), **{f"agent_config.{k}": v for k, v in asdict(agent_config).items()}}
    usual = {
        **asdict(TrainConfig(family="")),
        **{f"agent_config.{k}": v for k, v in _defaults(config.agent).items()},
    }
    held = {**run.config, **{f"agent_config.{k}": v for k, v in run.config["agent_config"].items()}}
    for name, value in asked.items():
        if name in CHANGEABLE_ON_RESUME:
            continue
        required = name in ("family", "agent", "steps")
        longer = name == "steps" and int(value) > int(held["steps"])
        if value != held.get(name) and not longer and (required or value != usual.get(name)):
            shown = name.removeprefix("agent_config.")
            raise MetarobotError(
                f"cannot resume {out} with {shown} {value!r}: it was trained with {held.get(name)!r}"
            )
    before: dict[str, Any] = {"device": "cpu", "sim": "cpu", **run.config}
    moved: dict[str, Any] = {}
    if config.device != before["device"] or config.sim not in ("", before["sim"]):
        check_config(config)
        now = asdict(_simulated(config, run.family, agent_config, say))
        moved = {k: now[k] for k in CHANGEABLE_ON_RESUME}
        so_far = f"{before['sim']} physics and learning on {before['device']}"
        say(
            f"goes on with {now['sim']} physics and learning on {now['device']}, after {so_far}: other roundings"
        )
    if config.steps > run.config["steps"]:
        moved["steps"] = config.steps
    return extend_run(run, moved) if moved else run


@contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Say in a line that a device's memory is not enough for what is learned from."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        why = str(e).partition(". ")[0]
        raise MetarobotError(
            f"out of memory ({why}); take fewer --worlds, or more --minibatches"
        ) from e


@out_of_memory_errors()
def train(
    run: Run,
    *,
    resume: bool = False,
    show: bool = True,
    tick: Callable[[dict[str, float]], None] = lambda _: None,
) -> bool:
    """Train until the steps are done; return False if a signal stopped it first, with everything
    saved.

    ``tick`` is given the metrics of each iteration.
    """
    learner, config = (
        run.learner(),
        TrainConfig(
            **{
                "sim": "cpu",
                **{k: run.config[k] for k in TrainConfig.__dataclass_fields__ if k in run.config},
            }
        ),
    )
    check_config(config)
    move_to_device(learner, config.device)
    counters: dict[str, Any] = {"iteration": 0, "steps": 0, "elapsed_s": 0.0}
    if resume and (run.folder / "checkpoint.json").exists():
        counters = _restore(run, learner)
    else:
        _begin(learner, run.family, config)
    keep_freed_memory()
    threads = config.threads or len(os.sched_getaffinity(0))
    fit = agents.get(run.agent).fit
    iterate = (
        _collected(run, learner, config, threads)
        if fit is None
        else fit(learner, run.family, threads)
    )
    with (
        MetricsLog(
            run.folder, config.steps, counters["steps"], counters["iteration"], show=show
        ) as log,
        deferred_signals() as stopped,
        restored_torch_threads(),
    ):
        while counters["steps"] < config.steps and not stopped:
            metrics = _iterate(run, iterate, counters)
            log.write(metrics)
            tick(metrics)
            if (
                counters["iteration"] % config.save_every == 0
                or stopped
                or counters["steps"] >= config.steps
            ):
                save_checkpoint(run.folder, learner.state(), counters)
    return bool(counters["steps"] >= config.steps)


def _lived(run: Run, learner: Learner, where: worlds.TaskSource) -> Callable[[int], Trials]:
    """Return a function that lets the agent live the trials of an iteration."""
    config, env = run.config["agent_config"], where.env
    usual = {
        "episodes": config["episodes"],
        "rollouts": run.rollouts,
        "record_teacher": config.get("teach", 0) > 0,
    }

    def live(i: int) -> Trials:
        agent = learner.agent.to(env.device)
        return collect(agent, env, where.deal(i), seed=_seed(run, i), **usual)

    return live


def _imitated(
    family: Family, worlds: int, rollouts: int, config: TrainConfig
) -> Callable[[int], Trials]:
    """Return a function that draws the demonstrations of an iteration."""
    demos, variants = read_demonstrations(Path(config.demos), family), family.interaction.variants
    if rollouts % variants:
        raise MetarobotError(
            f"rollouts = {rollouts} is not a multiple of {variants}, the variants of {family.name}"
        )
    return lambda i: demos.trials(worlds // rollouts, rollouts // variants, [config.seed, i])


def _seed(run: Run, i: int) -> int:
    return int(np.random.SeedSequence([run.config["seed"], i]).generate_state(1)[0])


def _collected(run: Run, learner: Learner, config: TrainConfig, threads: int) -> TrainingStep:
    """Return a function that gets trials and learns from them once."""
    sizes = run.config["agent_config"].get("worlds", 0), run.rollouts
    lost: Callable[[], dict[str, float]] = dict
    if config.demos:
        live = _imitated(run.family, *sizes, config)
    else:
        where: dict[str, Any] = {k: getattr(config, k) for k in ("sim", "device", "pool")} | {
            "threads": threads
        }
        lived_in = worlds.make_task_source(run.family, *sizes, seed=config.seed, **where)
        live, lost = _lived(run, learner, lived_in), lived_in.lost

    def iterate(i: int, progress: float, seed: int) -> tuple[int, dict[str, float]]:
        began = time.monotonic()
        # torch's worker threads would spin against the physics threads: one is faster while
        # collecting
        torch.set_num_threads(1)
        trials = live(i)
        lived = trials.steps()  # which waits for the device
        collected = time.monotonic()
        torch.set_num_threads(threads)
        learner.agent.to(config.device)
        metrics = learner.update(trials.to(config.device), progress, seed)
        speed = {
            "time/collect_fps": lived / (collected - began),
            "time/learn_fps": lived / (time.monotonic() - collected),
        }
        return lived, {
            **({} if config.demos else rollout_metrics(trials)),
            **lost(),
            **metrics,
            **speed,
        }

    return iterate


def _iterate(run: Run, iterate: TrainingStep, counters: dict[str, Any]) -> dict[str, float]:
    """Go through one iteration; advance the counters and return the metrics."""
    began, i = time.monotonic(), counters["iteration"]
    lived, metrics = iterate(i, counters["steps"] / run.config["steps"], _seed(run, i))
    took = time.monotonic() - began
    counters["iteration"] += 1
    counters["steps"] += lived
    counters["elapsed_s"] += took
    speed = {
        "time/fps": lived / took,
        "time/iterations": counters["iteration"],
        "time/total_timesteps": counters["steps"],
        "time/time_elapsed": counters["elapsed_s"],
    }
    return {**metrics, **speed}


def rollout_metrics(trials: Trials) -> dict[str, float]:
    """Summarise trials: returns by episode, adaptation gain, reward terms and broken episodes."""
    returns = trials.returns().mean(1)
    metrics = {
        "rollout/ep_rew_mean": float(returns.mean()),
        "rollout/ep_len_mean": trials.steps() / trials.returns().numel(),
        "meta/pre_adapt_return": float(returns[0]),
        "meta/post_adapt_return": float(returns[-1]),
        "meta/adaptation_gain": float(returns[-1] - returns[0]),
        "sim/faults": float(trials.faults()),
    }
    metrics |= {f"meta/return_episode_{k + 1}": float(r) for k, r in enumerate(returns)}
    for name in trials.episodes[0].terms:
        metrics[f"reward/{name}"] = float(
            torch.stack([e.terms[name].mean() for e in trials.episodes]).mean()
        )
    return metrics


def _restore(run: Run, learner: Learner) -> dict[str, Any]:
    tensors, counters = run.checkpoint()
    try:
        learner.load(tensors)
        return {k: counters[k] for k in ("iteration", "steps", "elapsed_s")}
    except (KeyError, RuntimeError, ValueError) as e:
        raise CheckpointError(
            f"{run.folder} holds no checkpoint to continue from: {' '.join(str(e).split())}"
        ) from e


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that an iteration ends before training stops; a
    second one is final.
    """
    stopped: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield stopped
        return
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _machine() -> str:
    """Name the processor and the number of cores that may be used."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _defaults(agent: str) -> dict[str, Any]:
    return asdict(agents.get(agent).config())
