"""The functions behind ``import metarobot``; the command line is made of them.

Each one imports what it needs when it is called, so that listing families needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from metarobot.errors import MetarobotError

if TYPE_CHECKING:
    from metarobot.env.base import Env
    from metarobot.evaluation.compare import Job, PlanETA
    from metarobot.evaluation.report import ComparisonReport, EvaluationReport
    from metarobot.tasks.family import Family
    from metarobot.tasks.space import Task
    from metarobot.training.config import TrainConfig
    from metarobot.training.run_folder import Run

    OneRun: TypeAlias = Run | str | Path
    """A run, its folder, or the name of a trained agent in the box."""
    Runs: TypeAlias = OneRun | Sequence[OneRun]
    """One run or several: the training seeds of one agent."""

Progress = Callable[[int, int], None]
"""Called with how much work is done, and how much there is in all."""


def no_progress(done: int, total: int) -> None:
    """Show no progress."""


# ---------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------


def families() -> list[str]:
    """Return the names of all task families."""
    from metarobot.tasks.family import families as registry

    return registry.names()


def family(name: str, robot: str = "") -> Family:
    """Return a task family.

    Args:
        name: Its name; ``families()`` lists them.
        robot: Another model of its robot: a path to an MJCF, or ``menagerie:name``.

    Raises:
        MetarobotError: There is no such family, or it has no other robot.
    """
    from metarobot.tasks.family import family_on

    return family_on(name, robot)


def agents() -> list[str]:
    """Return the names of all kinds of agent that can be trained."""
    from metarobot.learning.agent_interface import agents as registry

    return registry.names()


def make_env(
    family: str | Family,
    tasks: Sequence[Task | Mapping[str, float]] | None = None,
    *,
    worlds: int | None = None,
    split: str = "train",
    robot: str = "",
    sim: str = "cpu",
    device: str = "cpu",
    seed: int = 0,
    threads: int = 0,
) -> Env:
    """Build a batched environment: one world a task, stepped together.

    Args:
        family: A task family or its name.
        tasks: One task a world, each a ``Task`` or its values by name; drawn from ``split`` if not
            given.
        worlds: Number of worlds, one if nothing is given; with ``tasks``, a multiple of their
            number, the worlds of a task side by side.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        robot: Another model of the robot: a path to an MJCF, or ``menagerie:name``.
        sim: ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp).
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        seed: Draws tasks and starts.
        threads: Physics threads on the CPU; 0 takes all there are.

    Raises:
        MetarobotError: An unknown name, or a simulator that cannot run this family here.
    """
    from metarobot.env.factory import make_env as build
    from metarobot.tasks.family import family_on

    if isinstance(family, str):
        family = family_on(family, robot)
    if worlds is not None and worlds < 1:
        raise MetarobotError(f"worlds must be at least 1, not {worlds}")

    # Worlds of one task stand side by side.
    placed: list[Task | Mapping[str, float]]
    if tasks is None:
        placed = [*family.space.sample(split, worlds or 1, seed)]
    else:
        count = worlds or len(tasks)
        if not tasks or count % len(tasks):
            raise MetarobotError(f"worlds = {count} is not a multiple of {len(tasks)} tasks")
        placed = [task for task in tasks for _ in range(count // len(tasks))]
    return build(family, placed, sim=sim, device=device, seed=seed, threads=threads)


def load_agent(where: OneRun, robot: str = "") -> Any:
    """Load a trained agent, ready to act: a ``metarobot.learning.agent_interface.Agent``.

    Args:
        where: A run, its folder, or the name of a trained agent in the box.
        robot: Another model of the robot than it was trained on.

    Raises:
        MetarobotError: There is no such run, or it is damaged.
    """
    return _open(where, robot).load_agent()


# ---------------------------------------------------------------------------------------------
# What can be done
# ---------------------------------------------------------------------------------------------


def train(
    family: str | TrainConfig,
    agent: str = "rl2",
    *,
    agent_config: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Meta-train an agent over a family's training tasks and return its run.

    Ctrl-C saves, and ``resume=True`` continues, bit for bit as if never interrupted.

    Args:
        family: Name of the task family, or a whole ``TrainConfig``.
        agent: Kind of agent; ``agents()`` lists them.
        agent_config: The agent's settings as a whole, instead of by name.
        out: Run folder to write; runs/FAMILY-AGENT-SEED if not given.
        resume: Continue the run in ``out``; more ``steps`` than it had make it longer.
        quiet: Show no progress on standard error.
        settings: Settings of the training, such as ``steps`` and ``seed``, and the agent's own,
            such as ``worlds``; see ``TrainConfig`` and the agent's configuration class.

    Raises:
        MetarobotError: A setting that is unknown or cannot work, or a folder that holds a run.
        TrainingStopped: A signal stopped the training; everything is saved.
    """
    from metarobot.training.config import KEPT_ON_RESUME, TrainConfig, whole_number
    from metarobot.training.run_folder import read_train_config
    from metarobot.training.train import (
        TrainingStopped,
        open_training,
        reopen_run,
        start_training,
    )

    if isinstance(family, TrainConfig):
        config = family
        if settings:
            raise MetarobotError("give settings in the TrainConfig or by name, not in both")
        if agent_config is None:
            agent_config = _build_agent_config(config.agent, {})
    else:
        train_names = {field.name for field in fields(TrainConfig)}
        # What is no setting of the training is one of the agent.
        own = {k: settings.pop(k) for k in list(settings) if k in train_names}
        if agent_config is None:
            agent_config = _build_agent_config(agent, settings, sorted(train_names))
        elif settings:
            raise MetarobotError("give the agent's settings in agent_config or by name, not both")
        if "steps" in own:
            own["steps"] = whole_number(str(own["steps"]))
        config = TrainConfig(family=family, agent=agent, **own)
        if resume:
            # As on the command line: steps and device stay as they were unless they are given.
            held = read_train_config(out or default_folder(config))
            kept = {k: getattr(held, k) for k in KEPT_ON_RESUME if k not in own}
            config = replace(config, **kept)

    folder = default_folder(config) if out is None else Path(out)
    say = _no_line if quiet else partial(print, file=sys.stderr)
    if resume:
        training = open_training(reopen_run(config, agent_config, folder, say))
    else:
        training = start_training(config, agent_config, folder, say)
    if not training.train(show=not quiet):
        raise TrainingStopped(f"stopped and saved in {folder}")
    return training.run


def default_folder(config: TrainConfig) -> Path:
    """Return the folder of a run for which none is given."""
    return Path("runs") / f"{config.family}-{config.agent.replace(':', '-')}-{config.seed}"


def evaluate(
    runs: Runs,
    *,
    split: str = "test",
    tasks: int = 40,
    episodes: int = 2,
    seed: int = 0,
    quiet: bool = False,
    threads: int = 0,
    sim: str = "cpu",
    device: str = "cpu",
    oracle: Runs = (),
    blind: Runs = (),
    finetune: Runs = (),
    controls: bool = False,
    robot: str = "",
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Measure how an agent adapts on held-out tasks: return after 0, 1, … episodes.

    Args:
        runs: The agent: a run, its folder, the name of an agent in the box, or a list of them,
            which are training seeds of one method.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        episodes: Episodes in each task.
        seed: Draws the tasks and the starts.
        quiet: Play the last episode without noise, also with agents that need noise to adapt.
        threads: Physics threads; 0 takes all there are.
        sim: ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp).
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        oracle: Runs of the upper reference, shown the task.
        blind: Runs of the lower reference, which cannot adapt.
        finetune: Policies trained as ppo or blind, to be fine-tuned as the agent adapts.
        controls: Also play with the context cleared, or swapped for another task's.
        robot: Another model of the robot than the agents were trained on.
        progress: Called after each trial.

    Raises:
        MetarobotError: Runs of different families, or a protocol that cannot be played.
    """
    from metarobot.evaluation.evaluate import count_trials
    from metarobot.evaluation.evaluate import evaluate as measure
    from metarobot.evaluation.protocol import Protocol
    from metarobot.evaluation.report import EvaluationReport

    protocol = Protocol(
        split=split,
        tasks=tasks,
        episodes=episodes,
        seed=seed,
        quiet=quiet,
        threads=threads,
        sim=sim,
        device=device,
    )
    agent_runs = _open_all(runs, robot)
    oracle_runs = _open_all(oracle, robot)
    blind_runs = _open_all(blind, robot)
    finetune_runs = _open_all(finetune, robot)
    if not agent_runs:
        raise MetarobotError("evaluation needs at least one run")
    total = count_trials(
        len(agent_runs),
        len(oracle_runs),
        len(blind_runs),
        len(finetune_runs),
        controls,
        agent_runs[0].family.teaching.expert is not None,
    )
    data = measure(
        agent_runs,
        protocol,
        oracle=oracle_runs,
        blind=blind_runs,
        finetune=finetune_runs,
        controls=controls,
        tick=_counted(progress, total),
    )
    return EvaluationReport(data)


def compare(
    family: str,
    agents: Sequence[str] = (),
    *,
    out: str | Path = "runs",
    steps: float = 2_000_000,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    reuse: Sequence[str | Path] = (),
    split: str = "test",
    tasks: int = 40,
    episodes: int = 2,
    seed: int = 0,
    threads: int = 0,
    say: Callable[[str], None] | None = None,
    watch: Callable[[Job, Mapping[str, float], PlanETA], None] | None = None,
    progress: Progress = no_progress,
) -> ComparisonReport:
    """Compare agents on one family: train each for equal steps, and play the same held-out tasks.

    What has been trained or played before is not done again.

    Args:
        family: Name of the task family.
        agents: Kinds of agent; all that learn from their own trials if not given.
        out: Folder of the runs, FAMILY-AGENT-SEED each.
        steps: Environment steps that each agent trains for.
        seeds: Training seeds of each agent.
        settings: Settings of single agents, agent -> name -> value.
        reuse: Run folders, or folders of them, to take finished runs from.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        episodes: Episodes in each task.
        seed: Draws the tasks and the starts.
        threads: CPU threads; 0 takes all there are.
        say: Called with a line for what is found, resumed or trained.
        watch: Called after each iteration of a training, with its metrics and the time left.
        progress: Called after each trial that is played.

    Raises:
        MetarobotError: Whatever cannot work, before anything is trained.
        TrainingStopped: A signal stopped the training; everything is saved.
    """
    from metarobot.evaluation.compare import Plan, compare_runs, count_plays, train_plan
    from metarobot.evaluation.protocol import Protocol
    from metarobot.evaluation.report import ComparisonReport
    from metarobot.training.config import whole_number
    from metarobot.training.train import TrainingStopped

    protocol = Protocol(split=split, tasks=tasks, episodes=episodes, seed=seed, threads=threads)
    plan = Plan(
        family=family,
        out=Path(out),
        agents=tuple(agents),
        steps=whole_number(str(steps)),
        seeds=tuple(seeds),
        settings={} if settings is None else settings,
        reuse=tuple(Path(folder) for folder in reuse),
        threads=threads,
    )
    runs = train_plan(plan, protocol, say or _no_line, watch or _no_watch)
    if not runs:
        raise TrainingStopped(f"stopped and saved in {out}")
    total = count_plays(runs, protocol)
    return ComparisonReport(compare_runs(plan, runs, protocol, _counted(progress, total)))


def render(
    run: OneRun,
    out: str | Path,
    *,
    split: str = "test",
    tasks: int = 1,
    episodes: int = 2,
    seed: int = 0,
    task: Mapping[str, float] | None = None,
    robot: str = "",
    size: tuple[int, int] = (320, 240),
    fps: float | None = None,
    progress: bool = True,
) -> Path:
    """Film an agent adapting, one task a row, its episodes side by side; return the video's path.

    Args:
        run: A run, its folder, or the name of a trained agent in the box.
        out: Video to write, .mp4 or .gif.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        episodes: Episodes of each task.
        seed: Draws the tasks and the starts.
        task: One task of your own instead: the value of each parameter by name.
        robot: Another model of the robot than the agent was trained on.
        size: Width and height of one panel, pixels.
        fps: Frames a second; by default the control rate (mp4, at most 30) or 12.5 (gif).
        progress: Whether to show a progress bar.

    Raises:
        MetarobotError: An unknown suffix or parameter, or no OpenGL.
    """
    from metarobot.evaluation.protocol import Protocol
    from metarobot.evaluation.trial_film import film

    Protocol(split=split, tasks=tasks, episodes=episodes)  # raises for counts below one
    opened = _open(run, robot)
    space = opened.family.space
    chosen = space.sample(split, tasks, seed) if task is None else [space.task(**task)]
    return film(
        opened.load_agent(),
        opened.family,
        chosen,
        out=Path(out),
        episodes=episodes,
        seed=seed,
        rollouts=opened.rollouts,
        title=f"{opened.family.name}  ·  {opened.agent}",
        size=size,
        fps=fps,
        progress=progress,
    )


def export(
    run: OneRun,
    out: str | Path,
    *,
    robot: str = "",
    tasks: int = 3,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Export an agent for a robot: a folder with ONNX and JSON. Return the policy's metadata.

    Whole trials are played by torch's agent and the exported one side by side; where an action
    differs by more than 1e-5, nothing is written.

    Args:
        run: A run, its folder, or the name of a trained agent in the box.
        out: Policy folder to write; a policy that is there already is replaced.
        robot: Another model of the robot than the agent was trained on.
        tasks: Number of tasks to play side by side.
        seed: Draws these tasks and the starts.
        progress: Called as the export goes on.

    Raises:
        MetarobotError: An agent that cannot be exported, or a missing package.
    """
    from metarobot.deploy.onnx_export import count_export_trials
    from metarobot.deploy.onnx_export import export as write

    tick = _counted(progress, count_export_trials(tasks))
    return write(_open(run, robot), Path(out), tasks=tasks, seed=seed, tick=tick)


# ---------------------------------------------------------------------------------------------


def _open(run: OneRun, robot: str = "") -> Run:
    """Open a run, and warn in a line if it was made from something else than is here."""
    from metarobot.training.identity import warn_of_differences
    from metarobot.training.run_folder import Run, open_run

    if isinstance(run, Run):
        opened = open_run(run.folder, robot) if robot else run
    else:
        opened = open_run(run, robot)
    warn_of_differences(opened, other_robot=bool(robot))
    return opened


def _open_all(runs: Runs, robot: str) -> list[Run]:
    from metarobot.training.run_folder import Run

    if isinstance(runs, Run | str | Path):
        return [_open(runs, robot)]
    return [_open(run, robot) for run in runs]


def _build_agent_config(
    agent: str, settings: Mapping[str, Any], train_names: Sequence[str] = ()
) -> Any:
    """Build an agent's configuration from settings by name.

    Raises:
        MetarobotError: A setting that neither the agent nor the training has.
    """
    from metarobot.learning.agent_interface import agents as registry

    kind = registry.get(agent)
    names = [field.name for field in fields(kind.config)]
    for name in settings:
        if name not in names:
            raise MetarobotError(
                f"{name!r} is no setting of agent {agent!r}, which has: {', '.join(names)}; "
                f"nor of a training, which has: {', '.join(train_names)}"
            )
    return kind.config(**settings)


def _counted(progress: Progress, total: int) -> Callable[[], None]:
    """Return a function that reports one more piece of work each time it is called."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return tick


def _no_line(line: str) -> None:
    """Show no line."""


def _no_watch(job: Job, metrics: Mapping[str, float], eta: PlanETA) -> None:
    """Show no progress of a training."""
