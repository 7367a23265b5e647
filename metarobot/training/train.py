"""Meta-training: sample tasks, collect trials, update, log, save; resumable bit for bit.

Every iteration's tasks, starts, noise and minibatches are keyed by (seed, iteration), so the state
of a training is its learner and three counters, and a checkpoint holds all of it.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import mujoco
import numpy as np
import torch

from metarobot.config_bounds import check_bounds
from metarobot.env import factory
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import (
    Learner,
    ReservesMemory,
    TrainingStep,
    WarmStarts,
    agents,
    is_memoryless,
)
from metarobot.learning.finite_check import (
    FiniteCheck,
    finite_state,
    mean_sound_returns,
    valid_trials,
)
from metarobot.learning.optimiser_state import move_to_device
from metarobot.tasks.family import Family, family_on
from metarobot.threads_and_memory import keep_freed_memory, restored_torch_threads
from metarobot.training.checkpoints import (
    has_checkpoint,
    read_checkpoint,
    save_checkpoint,
    settle,
    sweep_temporary_files,
)
from metarobot.training.collect import collect
from metarobot.training.config import (
    CHANGEABLE_ON_RESUME,
    HARMLESS_SETTINGS,
    TrainConfig,
    check_config,
    needs_teacher,
    resolve_paths,
    rollouts_of,
)
from metarobot.training.demonstrations import read_demonstrations
from metarobot.training.identity import (
    describe_origin,
    folder_digest,
    robot_digest,
    thread_count,
    warn_of_differences,
)
from metarobot.training.metrics_log import MetricsLog, read_metrics
from metarobot.training.run_files import CheckpointError, one_line, read_made_from
from metarobot.training.run_folder import (
    Run,
    build_learner,
    change_run,
    check_unused,
    create_run,
    open_run,
    read_config,
    read_train_config,
)
from metarobot.training.run_lock import RunLock
from metarobot.training.task_sampling import TaskSource, make_task_source
from metarobot.types import Trials

Metrics = dict[str, float]
TrialSource = Callable[[int], Trials]
"""Iteration -> the trials that it learns from."""


RETURN_METRIC = "meta/post_adapt_return"
"""Metric of the last episode's return."""
RETURN_WINDOW = 10
"""Iterations over which the return is averaged that tells the best checkpoint."""


class TrainingStopped(KeyboardInterrupt):
    """A signal stopped a training; everything is saved, and it can be resumed."""


@dataclass
class Counters:
    """How far a training has come."""

    iteration: int = 0
    steps: int = 0
    """Collected environment steps."""
    elapsed_s: float = 0.0


@dataclass
class Training:
    """A training with its run folder, learner and worlds, ready to run."""

    run: Run
    learner: Learner
    iterate: TrainingStep
    counters: Counters
    lock: RunLock
    """Held until the training is done or stopped: no other process writes the folder."""

    def __post_init__(self) -> None:
        self.finite_check = FiniteCheck(self.learner)

    def train(
        self, *, show: bool = True, tick: Callable[[Metrics], None] = lambda metrics: None
    ) -> bool:
        """Train until the steps are done.

        Args:
            show: Whether to show progress on standard error.
            tick: Called with the metrics of each iteration.

        Returns:
            Whether it is done; False if a signal stopped it, with everything saved.

        Raises:
            DivergedError: A loss, a weight or a statistic is not finite; the last checkpoint stays.
        """
        config = self.run.train_config
        counters = self.counters
        # Every iteration allocates the same tensors again.
        keep_freed_memory()
        if not self.lock.is_held:
            self.lock = RunLock(self.run.folder)
        with (
            self.lock,
            MetricsLog(
                self.run.folder, config.steps, counters.steps, counters.iteration, show=show
            ) as log,
            deferred_signals() as signals,
            restored_torch_threads(),
            out_of_memory_errors(),
        ):
            recent_returns = _recent_returns(self.run.folder)
            saved_s = time.monotonic()
            while counters.steps < config.steps and not signals:
                metrics = self._run_iteration()
                log.write(metrics)
                tick(metrics)

                if RETURN_METRIC in metrics:
                    recent_returns.append(metrics[RETURN_METRIC])

                # A kill must cost little, even before the first regular checkpoint.
                is_due = (
                    counters.iteration == 1
                    or counters.iteration % config.save_every == 0
                    or time.monotonic() - saved_s >= config.save_every_s
                )
                is_done = counters.steps >= config.steps
                # A signal that came during the iteration ends the loop: save before that.
                if is_due or is_done or signals:
                    saved = {**asdict(counters), "score": _score(recent_returns)}
                    save_checkpoint(self.run.folder, finite_state(self.learner), saved)
                    saved_s = time.monotonic()
        return counters.steps >= config.steps

    def _run_iteration(self) -> Metrics:
        """Collect and learn once; advance the counters and return the metrics."""
        config = self.run.train_config
        counters = self.counters

        began_s = time.monotonic()
        steps, metrics = self.finite_check.run(
            self.iterate,
            counters.iteration,
            counters.steps / config.steps,
            _iteration_seed(config.seed, counters.iteration),
        )
        took_s = time.monotonic() - began_s

        counters.iteration += 1
        counters.steps += steps
        counters.elapsed_s += took_s
        return {
            **metrics,
            "time/fps": steps / took_s,
            "time/iterations": counters.iteration,
            "time/total_timesteps": counters.steps,
            "time/time_elapsed": counters.elapsed_s,
        }


def start_training(
    config: TrainConfig,
    agent_config: Any,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Training:
    """Check settings, build learner and worlds, and write the folder of a new run.

    Nothing is written if anything does not fit.

    Args:
        config: What to train, and where.
        agent_config: The agent's own settings.
        out: Run folder to write.
        say: Called with a line on what simulates, where there is a choice.

    Raises:
        MetarobotError: A setting that cannot work, or a folder that holds a run or cannot be
            written.
    """
    config = resolve_paths(config)
    check_config(config)
    check_bounds(agent_config)
    check_unused(out)
    family = family_on(config.family, config.robot)
    config = choose_simulator(config, family, agent_config, say)

    # Whatever does not fit together raises here, before the folder exists.
    with out_of_memory_errors():
        worlds = _build_worlds(family, config, agent_config)
        if worlds is not None and needs_teacher(agent_config):
            worlds.env.teacher_action()  # raises if the family has no teacher
        learner = _build_learner_on_device(family, config, agent_config, worlds)
        _initialise(learner, family, config)
        iterate = _build_iteration(learner, family, config, agent_config, worlds)

    about = {
        "versions": _versions(),
        "machine": _machine(),
        "made_from": describe_origin(config, family),
    }
    lock = RunLock(out)
    try:
        run = create_run(out, config, agent_config, about)
    except BaseException:
        lock.release()
        raise
    return Training(run, learner, iterate, Counters(), lock)


def open_training(run: Run) -> Training:
    """Build learner and worlds of a run, to train on from its checkpoint if it has one.

    Raises:
        MetarobotError: A setting that does not work on this machine, a damaged checkpoint, or a
            folder that another training writes.
    """
    config = run.train_config
    check_config(config)

    # Locked before the checkpoint is read, so that nobody writes a newer one.
    lock = RunLock(run.folder)
    try:
        warn_of_differences(run, training=True)
        with out_of_memory_errors():
            worlds = _build_worlds(run.family, config, run.agent_config)
            learner = _build_learner_on_device(run.family, config, run.agent_config, worlds)
            if has_checkpoint(run.folder):
                counters = _restore(run, learner)
            else:
                sweep_temporary_files(run.folder)
                _initialise(learner, run.family, config)
                counters = Counters()
            iterate = _build_iteration(learner, run.family, config, run.agent_config, worlds)
        run = _record_threads(run)
    except BaseException:
        lock.release()
        raise
    return Training(run, learner, iterate, counters, lock)


def start_run(
    config: TrainConfig,
    agent_config: Any,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Make the run folder of a training that is trained later; see ``start_training``."""
    training = start_training(config, agent_config, out, say)
    training.lock.release()
    return training.run


def reopen_run(
    config: TrainConfig,
    agent_config: Any,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Open a run to continue it, with more steps, or on another device or simulator.

    A setting that has its default value is taken to be not given. A run that is made longer takes
    up its schedules where they now stand.

    Args:
        config: What to train; family, agent and steps must be those of the run, or more steps.
        agent_config: The agent's own settings.
        out: The run folder.
        say: Called with a line if the run moves to another device or simulator.

    Raises:
        MetarobotError: A setting that differs from what the run was started with.
    """
    config = resolve_paths(config)
    held = read_train_config(out)
    config, moved = _find_moved_paths(config, out)
    run = open_run(out, moved.get("robot", ""))
    _check_unchanged(out, config, agent_config, run)
    if not has_checkpoint(out):
        say(f"{out} has no checkpoint yet: it begins anew")

    # An empty ``sim`` is not given, so the run stays where it was simulated.
    changes: dict[str, Any] = {**moved}
    if config.device != held.device or config.sim not in ("", held.sim):
        check_config(config)
        now = choose_simulator(config, run.family, agent_config, say)
        changes |= {name: getattr(now, name) for name in CHANGEABLE_ON_RESUME}
        say(
            f"goes on with {now.sim} physics and learning on {now.device}, after {held.sim} "
            f"physics and learning on {held.device}: other roundings"
        )
    default = TrainConfig(family="")
    for name in HARMLESS_SETTINGS:
        value = getattr(config, name)
        if value not in (getattr(default, name), getattr(held, name)):
            changes[name] = value
    if config.steps > held.steps:
        changes["steps"] = config.steps
    if not changes:
        return run
    check_bounds(config)
    with RunLock(out):
        return change_run(run, changes)


def train(
    run: Run,
    *,
    show: bool = True,
    tick: Callable[[Metrics], None] = lambda metrics: None,
) -> bool:
    """Train a run from its checkpoint, or from the start; see ``Training.train``."""
    return open_training(run).train(show=show, tick=tick)


def choose_simulator(
    config: TrainConfig, family: Family, agent_config: Any, say: Callable[[str], None]
) -> TrainConfig:
    """Fill in what simulates.

    Raises:
        MetarobotError: It cannot have so many worlds, or does not run here.
    """
    # Demonstrations are simulated already, and loops of their own run on the CPU.
    if config.demos or agents.get(config.agent).fit is not None:
        return replace(config, sim="cpu")
    sim, why = factory.choose_simulator(family, config.sim, config.device)
    if config.sim or config.device != "cpu":
        say(why)
    factory.check_simulator(family, sim, config.device, agent_config.worlds)
    return replace(config, sim=sim)


def _check_unchanged(out: Path, config: TrainConfig, agent_config: Any, run: Run) -> None:
    """Check that a run is continued with the settings it was started with."""
    default_train = TrainConfig(family="")
    default_agent = agents.get(config.agent).config()
    compared = (
        (config, run.train_config, default_train),
        (agent_config, run.agent_config, default_agent),
    )
    for asked, held, default in compared:
        for field in fields(asked):
            name = field.name
            value = getattr(asked, name)
            before = getattr(held, name, None)
            if value == before or name in (*CHANGEABLE_ON_RESUME, *HARMLESS_SETTINGS):
                continue
            if name == "steps" and asked is config and value > before:
                continue  # the run is made longer
            # Of the others, a default value means that the setting was not given.
            is_required = asked is config and name in ("family", "agent", "steps")
            if is_required or value != getattr(default, name):
                raise MetarobotError(
                    f"cannot resume {out} with {name} {value!r}: it was trained with {before!r}"
                )


def _build_worlds(family: Family, config: TrainConfig, agent_config: Any) -> TaskSource | None:
    """Build the worlds that trials are collected in; None for an agent that needs none."""
    if config.demos or agents.get(config.agent).fit is not None:
        return None
    return make_task_source(
        family,
        agent_config.worlds,
        rollouts_of(agent_config),
        seed=config.seed,
        sim=config.sim,
        device=config.device,
        pool=config.pool,
        threads=thread_count(config),
    )


def _build_learner_on_device(
    family: Family, config: TrainConfig, agent_config: Any, worlds: TaskSource | None
) -> Learner:
    env: Env | None = None if worlds is None else worlds.env
    learner = build_learner(config.agent, agent_config, family, config.seed, env)
    move_to_device(learner, config.device)
    return learner


def _initialise(learner: Learner, family: Family, config: TrainConfig) -> None:
    """Let an untrained learner reserve memory, and start from the policy of ``config.init``."""
    if isinstance(learner, ReservesMemory):
        learner.reserve_memory()
    if not config.init:
        return

    source = open_run(config.init)
    policy = source.load_agent()
    if not is_memoryless(policy):
        raise MetarobotError(
            f"init needs a policy trained as ppo or blind; {config.init} was trained as "
            f"{source.agent}"
        )
    if not isinstance(learner, WarmStarts):
        raise MetarobotError(
            f"agent {config.agent!r} cannot begin as another policy; rl2, ppo, blind and oracle can"
        )
    if source.family.observations != family.observations:
        raise MetarobotError(
            f"init: {source.family.name}, which {config.init} knows, is observed otherwise than "
            f"{family.name}"
        )
    learner.warm_start(policy)


def _build_iteration(
    learner: Learner,
    family: Family,
    config: TrainConfig,
    agent_config: Any,
    worlds: TaskSource | None,
) -> TrainingStep:
    """Return the function that gets trials and learns from them once."""
    threads = thread_count(config)
    fit = agents.get(config.agent).fit
    if fit is not None:
        return fit(learner, family, threads)

    get_trials: TrialSource
    describe: Callable[[Trials], Metrics]
    if worlds is None:
        get_trials = _demonstration_source(family, config, agent_config)
        describe = _no_metrics
    else:
        get_trials = _collecting_source(learner, config, agent_config, worlds)
        describe = _collection_metrics(worlds)

    def iterate(i: int, progress: float, seed: int) -> tuple[int, Metrics]:
        began_s = time.monotonic()
        # Torch's worker threads would spin against the physics threads: one is faster here.
        torch.set_num_threads(1)
        trials = valid_trials(get_trials(i))
        steps = trials.steps()  # waits for the device, so the clock is read after it
        collected_s = time.monotonic()

        torch.set_num_threads(threads)
        # Collecting may have moved the agent to the device of the worlds.
        learner.agent.to(config.device)
        metrics = learner.update(trials.to(config.device), progress, seed)
        learned_s = time.monotonic()

        speed = {
            "time/collect_fps": steps / (collected_s - began_s),
            "time/learn_fps": steps / (learned_s - collected_s),
        }
        return steps, {**describe(trials), **metrics, **speed}

    return iterate


def _collecting_source(
    learner: Learner, config: TrainConfig, agent_config: Any, worlds: TaskSource
) -> TrialSource:
    """Return a function that lets the agent collect the trials of an iteration."""

    def get_trials(i: int) -> Trials:
        return collect(
            learner.agent.to(worlds.env.device),
            worlds.env,
            worlds.sample_tasks(i),
            episodes=agent_config.episodes,
            rollouts=rollouts_of(agent_config),
            seed=_iteration_seed(config.seed, i),
            record_teacher=needs_teacher(agent_config),
        )

    return get_trials


def _demonstration_source(family: Family, config: TrainConfig, agent_config: Any) -> TrialSource:
    """Return a function that draws the demonstrations of an iteration.

    Raises:
        MetarobotError: A dataset that cannot be read, or holds too few demonstrations.
    """
    demos = read_demonstrations(Path(config.demos), family)
    rollouts = rollouts_of(agent_config)
    variants = family.interaction.variants
    if rollouts % variants:
        raise MetarobotError(
            f"rollouts = {rollouts} is not a multiple of {variants}, the variants of {family.name}"
        )
    tasks = agent_config.worlds // rollouts

    def get_trials(i: int) -> Trials:
        return demos.trials(tasks, rollouts // variants, [config.seed, i])

    get_trials(0)  # raises if there are too few, before anything is written
    return get_trials


def _collection_metrics(worlds: TaskSource) -> Callable[[Trials], Metrics]:
    return lambda trials: {**rollout_metrics(trials), **worlds.overflow_metrics()}


def _no_metrics(trials: Trials) -> Metrics:
    return {}


def rollout_metrics(trials: Trials) -> Metrics:
    """Return the metrics of trials: returns, adaptation gain, reward terms, broken episodes."""
    # Return of each episode of the trial, averaged over worlds without a fault: (episode,).
    returns = mean_sound_returns(trials)
    metrics = {
        "rollout/ep_rew_mean": float(returns.mean()),
        "rollout/ep_len_mean": trials.steps() / trials.returns().numel(),
        "meta/pre_adapt_return": float(returns[0]),
        "meta/post_adapt_return": float(returns[-1]),
        # What adaptation is worth: the last episode's return above the first one's.
        "meta/adaptation_gain": float(returns[-1] - returns[0]),
        "sim/faults": float(trials.faults()),
    }
    for k, episode_return in enumerate(returns, start=1):
        metrics[f"meta/return_episode_{k}"] = float(episode_return)
    for name in trials.episodes[0].terms:
        episode_means = torch.stack([e.terms[name].mean() for e in trials.episodes])
        metrics[f"reward/{name}"] = float(episode_means.mean())
    return metrics


def _restore(run: Run, learner: Learner) -> Counters:
    """Restore a learner from a run's newest sound checkpoint and return its counters."""
    stored = read_checkpoint(run.folder)
    try:
        learner.load(stored.tensors())
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{run.folder} holds no checkpoint to continue from: {one_line(e)}"
        ) from e
    settle(run.folder, stored.entry)
    return Counters(**{field.name: getattr(stored.entry, field.name) for field in fields(Counters)})


def _recent_returns(folder: Path) -> deque[float]:
    """Return the last episode's returns of the last iterations that a run's log holds."""
    rows = read_metrics(folder / "metrics.jsonl")[-RETURN_WINDOW:]
    returns = [row.get(RETURN_METRIC) for row in rows]
    return deque((x for x in returns if x is not None), maxlen=RETURN_WINDOW)


def _score(recent_returns: deque[float]) -> float | None:
    """Return the mean return over the window; None until it is full, or if it is not finite."""
    mean = sum(recent_returns) / RETURN_WINDOW
    return mean if len(recent_returns) == RETURN_WINDOW and math.isfinite(mean) else None


def _record_threads(run: Run) -> Run:
    """Record the count of threads that a run is trained on with, if it is another one."""
    made_from = read_made_from(run.config)
    threads = thread_count(run.train_config)
    if made_from is None or made_from.threads == threads:
        return run
    return change_run(run, {"made_from": {**asdict(made_from), "threads": threads}})


def _find_moved_paths(config: TrainConfig, out: Path) -> tuple[TrainConfig, dict[str, str]]:
    """Take the robot's file and the demonstrations where they are now, if they are the same.

    Returns:
        The settings with the paths that the run holds, and the paths that have changed, by name.
    """
    made_from = read_made_from(read_config(out))
    held = read_train_config(out)
    moved = {}
    for name in ("robot", "demos"):
        given = getattr(config, name)
        before = getattr(held, name)
        if not given or not before or given == before:
            continue
        digest = robot_digest(given) if name == "robot" else folder_digest(Path(given))
        if digest and made_from is not None and digest == getattr(made_from, name):
            moved[name] = given
        elif Path(given).exists() or not _ends_with(before, given):
            continue
        # The same words in another working folder mean what they meant when the run began.
        config = replace(config, **{name: before})
    return config, moved


def _ends_with(path: str, end: str) -> bool:
    """Return whether a path ends with the parts of another, as /a/b/c does with b/c."""
    parts = Path(end).parts
    return Path(path).parts[-len(parts) :] == parts


@contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Turn torch's error about a device's memory into one line.

    Raises:
        MetarobotError: The device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        why = str(e).partition(". ")[0]
        raise MetarobotError(
            f"out of memory ({why}); take fewer --worlds, or more --minibatches"
        ) from e


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that an iteration ends before training stops.

    The second one raises KeyboardInterrupt.
    """
    received: list[int] = []

    # A second signal is from somebody who does not want to wait for the iteration to end.
    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone receives signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _iteration_seed(seed: int, i: int) -> int:
    # A hash of both, so that neighbouring seeds and iterations share no random numbers.
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


def _versions() -> dict[str, str]:
    return {
        "metarobot": version("metarobot"),
        "mujoco": mujoco.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _machine() -> str:
    """Return the processor's name and the number of cores that may be used."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                return f"{processor}, {len(os.sched_getaffinity(0))} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
