"""The command line: each subcommand is a few lines over the rooms it names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from metarobot.cli import compare as cli_compare
from metarobot.cli import demonstrations as cli_demos
from metarobot.cli import recognise as cli_likeness
from metarobot.cli import robot as cli_robot
from metarobot.cli.progress import bar
from metarobot.errors import MetarobotError


def families() -> None:
    """List the task families: what varies, over which ranges, and the splits tasks are drawn
    from.
    """
    from metarobot.tasks.family import families as registry

    for name in registry.names():
        family = registry.get(name)
        print(
            f"{name}\n  {family.doc}\n  horizon {family.horizon} steps, {len(family.observations)} observations"
        )
        print("\n".join("  " + line for line in family.space.describe().splitlines()) + "\n")


def agents() -> None:
    """List the kinds of agent that can be trained, and the trained agents in the box."""
    from metarobot.files import read_json
    from metarobot.learning.agent_interface import agents as registry
    from metarobot.training.run_folder import PRETRAINED_FOLDER, pretrained_names

    for name in registry.names():
        try:
            print(f"{name}: {registry.get(name).doc}")
        except MetarobotError as e:  # a package that is not there
            print(f"{name}: {e}")
    for name in pretrained_names():
        card = read_json(PRETRAINED_FOLDER / name / "card.json")
        print(f"{name}: {card['summary']}")


def evaluate(
    runs: Positional[tuple[str, ...]],
    /,
    split: str = "test",
    tasks: int = 40,
    episodes: int = 2,
    seed: int = 0,
    quiet: bool = False,
    threads: int = 0,
    oracle: tuple[str, ...] = (),
    blind: tuple[str, ...] = (),
    finetune: tuple[str, ...] = (),
    controls: bool = False,
    robot: str = "",
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Measure how runs adapt on held-out tasks: return after 0, 1, … episodes, beside oracle and
    blind.

    Args:
        runs: Run folders or trained agents in the box; several of one family are training seeds of
            one method.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        episodes: Episodes lived in each task; an agent that adapts between them, as maml does, has
            adapted 0, 1, 2, …
            times in them, each time to all of its rollouts.
        seed: Draws the tasks and the starts.
        quiet: Play the last episode without noise, also with agents that need noise to adapt.
        threads: Physics threads; 0 takes all there are.
        oracle: Runs of the upper reference, shown the task.
        blind: Runs of the lower reference, which cannot adapt.
        finetune: Policies trained as ppo or blind, to be fine-tuned with the episodes and gradient
            steps that the runs
            adapt with; untrained weights too. The step size of each is tuned on training tasks.
        controls: Also play with the context cleared, or swapped for another task's, after each
            episode.
        robot: Another model of the robot than the agents were trained on: a path to an MJCF, or
            menagerie:name.
        json: Where to write the report.
        plot: Where to draw the curves (.png, .svg or .pdf).
    """
    from metarobot.evaluation import plots as drawing
    from metarobot.evaluation import tables
    from metarobot.evaluation.evaluate import count_trials
    from metarobot.evaluation.evaluate import evaluate as measure
    from metarobot.evaluation.protocol import Protocol
    from metarobot.training import run_folder as checkpoint

    if plot is not None:
        drawing.check_suffix(plot)
    protocol = Protocol(
        split=split, tasks=tasks, episodes=episodes, seed=seed, quiet=quiet, threads=threads
    )
    agents, *others = (
        [checkpoint.open_run(r, robot) for r in group] for group in (runs, oracle, blind, finetune)
    )
    baselines = dict(zip(("oracle", "blind", "finetune"), others, strict=True))
    total = count_trials(
        len(agents),
        len(others[0]),
        len(others[1]),
        len(others[2]),
        controls,
        agents[0].family.teaching.expert is not None,
    )
    with bar() as progress:
        task = progress.add_task("playing", total=total)
        report = measure(
            agents, protocol, **baselines, controls=controls, tick=lambda: progress.advance(task)
        )
    print(tables.evaluation_table(report))
    if json is not None:
        from metarobot.files import write_json

        write_json(json, report)
    if plot is not None:
        drawing.plot_evaluation(report, plot)


def render(
    run: Positional[str],
    /,
    out: Path,
    split: str = "test",
    tasks: int = 1,
    episodes: int = 2,
    seed: int = 0,
    task: tuple[str, ...] = (),
    robot: str = "",
    size: tuple[int, int] = (320, 240),
    fps: float | None = None,
) -> None:
    """Film an agent adapting: one task a row, its episodes side by side.

    Args:
        run: Run folder or trained agent in the box.
        out: Video to write (.mp4 or .gif).
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks, a row each.
        episodes: Episodes of each task, side by side.
        seed: Draws the tasks and the starts.
        task: One task of your own instead, as name=value for each parameter.
        robot: Another model of the robot than the agent was trained on: a path to an MJCF, or
            menagerie:name.
        size: Width and height of one panel, pixels.
        fps: Frames a second; by default the control rate (mp4, at most 30) or 12.5 (gif). Always in
            real time.
    """
    from metarobot.evaluation.protocol import Protocol
    from metarobot.evaluation.trial_film import film
    from metarobot.tasks.space import parse_assignments
    from metarobot.training.run_folder import open_run

    Protocol(split=split, tasks=tasks, episodes=episodes)
    opened = open_run(run, robot)
    space = opened.family.space
    chosen = [space.task(**parse_assignments(task))] if task else space.sample(split, tasks, seed)
    agent = opened.load_agent()
    title = f"{opened.family.name}  ·  {opened.agent}"
    take = partial(film, episodes=episodes, seed=seed, rollouts=opened.rollouts, title=title)
    take(agent, opened.family, chosen, out=out, size=size, fps=fps)
    print(f"wrote {out}")


def sinusoid(
    out: Path = Path("sinusoid.png"),
    iterations: int | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Explain MAML with a picture: learn to regress a sine wave from ten points by one gradient
    step.

    The example of Finn et al. (2017), trained here in about two minutes by the inner loop that
    adapts robots: MAML beside one network trained jointly on all waves, both fine-tuned in the same
    way.

    Args:
        out: Picture to write (.png, .svg or .pdf).
        iterations: Outer steps; by default as many as make a good picture.
        seed: Draws everything.
        json: Where to write the errors.
    """
    from metarobot.evaluation.plots import check_suffix, plot_regression
    from metarobot.evaluation.sinusoid_example import SinusoidConfig, compare
    from metarobot.files import write_json

    check_suffix(out)
    if iterations is not None and iterations < 1:
        raise MetarobotError(f"iterations must be at least 1, not {iterations}")
    config = (
        SinusoidConfig(seed=seed)
        if iterations is None
        else SinusoidConfig(seed=seed, iterations=iterations)
    )
    with bar() as progress:
        tasks = {
            name: progress.add_task(name, total=config.iterations)
            for name in ("MAML", "joint training")
        }
        result = compare(
            config, lambda name, i, error: progress.update(tasks[name], completed=i + 1)
        )
    for name, errors in result.errors.items():
        print(
            f"{name}: mean squared error after 0, 1, … gradient steps: {', '.join(f'{e:.3f}' for e in errors)}"
        )
    plot_regression(result.x, result.truth, result.seen, result.curves, result.errors, out)
    if json is not None:
        write_json(json, {"iterations": config.iterations, "seed": seed, "errors": result.errors})
    print(f"wrote {out}")


def plot(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path,
    reach: tuple[float, ...] = (),
    at: tuple[float, ...] = (),
) -> None:
    """Draw the learning curves of runs, over wall time and over steps.

    Args:
        runs: Run folders.
        out: Picture to write (.png, .svg or .pdf).
        reach: Also print when the last episode's return, mean of 10 iterations with exploration,
            first came this high.
        at: Also print that return after so many seconds of training, and the steps it took.
    """
    from metarobot.evaluation.plots import plot_learning_curves
    from metarobot.evaluation.tables import milestone_lines
    from metarobot.training.metrics_log import read_metrics
    from metarobot.training.run_folder import open_run

    opened = [open_run(r) for r in runs]
    plot_learning_curves(opened, out)
    milestones = milestone_lines({r.name: read_metrics(r.folder / "metrics.jsonl") for r in opened}, reach, at)
    if milestones:
        print(milestones)
    print(f"wrote {out}")


def publish(
    run: Positional[str], /, out: Path, summary: str, command: str, report: Path | None = None
) -> None:
    """Copy a run's agent, without its optimiser, with a card of how it was made.

    Args:
        run: Run folder.
        out: Folder to write.
        summary: What the agent is, in a sentence.
        command: The command that made it.
        report: What ``metarobot evaluate --json`` or ``shots --json`` found of it, to go on the
            card.
    """
    from metarobot.evaluation.evaluate import card_results
    from metarobot.files import read_json
    from metarobot.training.metrics_log import read_metrics
    from metarobot.training.run_folder import open_run
    from metarobot.training.run_folder import publish_agent as copy

    opened = open_run(run)
    last = read_metrics(opened.folder / "metrics.jsonl")[-1]
    facts: dict[str, Any] = {
        "steps": last["time/total_timesteps"],
        "wall_s": round(last["time/time_elapsed"], 1),
    }
    facts["seed"] = opened.config["seed"]
    if "meta/post_adapt_return" in last:
        facts["return_last_episode"] = round(last["meta/post_adapt_return"], 1)
    if "machine" in opened.config:
        facts["machine"] = (
            f"{opened.config['machine']}, {opened.config['threads'] or 'all'} of them used"
        )
    if report is not None:
        facts["results"] = card_results(read_json(report))
    copy(opened, out, {"summary": summary, "command": command, **facts})


def _train_command(agent: str) -> Callable[..., None]:
    """Make the train command for one agent, so that ``--help`` shows that agent's own settings."""
    from metarobot.learning.agent_interface import agents as registry
    from metarobot.training.config import TrainConfig

    kind = registry.get(agent).config
    usual = TrainConfig(family="")

    def train(
        family: Positional[str],
        /,
        out: Path,
        config: Annotated[Any, tyro.conf.arg(name="")],
        agent: str = "rl2",
        robot: str = usual.robot,
        init: str = usual.init,
        demos: str = usual.demos,
        steps: float | None = None,
        seed: int = usual.seed,
        device: str | None = None,
        sim: str = usual.sim,
        pool: int = usual.pool,
        threads: int = usual.threads,
        save_every: int = usual.save_every,
        resume: bool = False,
    ) -> None:
        """Meta-train an agent over a family's training tasks.

        Ctrl-C saves; ``--resume`` continues, bit for bit as if never interrupted. Progress goes to
        the terminal, metrics.jsonl and TensorBoard. The flags below that are not listed here are
        the chosen agent's own settings.

        Args:
            family: Task family; ``metarobot families`` lists them.
            out: Run folder to write.
            config: Settings of the agent.
            agent: Kind of agent; ``metarobot agents`` lists them.
            robot: Another model of the family's robot: a path to an MJCF, or menagerie:name.
            init: A policy without memory to begin as: an agent trained as ppo or blind.
            demos: Minari dataset to imitate, for ``--agent imitation``; ``metarobot record`` makes
                them.
            steps: Environment steps to train for; 2e6 if not given, or with ``--resume`` what the
                run was started with.
            seed: The same seed, settings and thread count give the same weights.
            device: Where learning happens, cpu or cuda; cpu if not given, or with ``--resume``
                where it did.
            sim: What simulates, cpu or warp (MuJoCo Warp, on the device); if not given, warp with
                ``--device cuda``
                where it is installed and runs the family, else cpu.
            pool: On Warp, how many training tasks there are, if each has a model of its own; 0 is
                4,096.
            threads: CPU threads; 0 takes all there are.
            save_every: Iterations between checkpoints.
            resume: Continue the run in ``out``; more steps than it had make it longer.
        """
        where = {
            "family": family,
            "agent": agent,
            "robot": robot,
            "init": init,
            "demos": demos,
            "sim": sim,
        }
        usually = {"seed": seed, "pool": pool, "threads": threads, "save_every": save_every}
        _train(where | usually, config, out, steps, device, resume)

    train.__annotations__["config"] = Annotated[kind, tyro.conf.arg(name="")]
    return train


def _train(
    settings: dict[str, Any],
    config: Any,
    out: Path,
    steps: float | None,
    device: str | None,
    resume: bool,
) -> None:
    """Start or continue a run; what is not given is as it was, or as usual."""
    from metarobot.training.config import TrainConfig
    from metarobot.training.run_folder import open_run
    from metarobot.training.train import reopen_run, start_run
    from metarobot.training.train import train as run_training

    usual = TrainConfig(family="")
    held = open_run(out).config if resume else {}
    steps = held.get("steps", usual.steps) if steps is None else steps
    device = held.get("device", usual.device) if device is None else device
    whole = int(steps) if steps == steps and abs(steps) < 1e15 else -1
    asked = TrainConfig(**settings, steps=whole, device=device)
    run = (reopen_run if resume else start_run)(asked, config, out, partial(print, file=sys.stderr))
    if run_training(run, resume=resume):
        print(f"done: {out}; now: metarobot {'shots' if asked.demos else 'evaluate'} {out}")
    else:
        print(f"stopped and saved; continue with: metarobot {_again()}", file=sys.stderr)
        sys.exit(130)


def _check_gl() -> None:
    """MuJoCo does not import under a ``MUJOCO_GL`` it cannot load: say so in a line, not a
    traceback.
    """
    try:
        import mujoco
    except (RuntimeError, AttributeError) as e:
        if "MUJOCO_GL" not in os.environ or hasattr(sys.modules.get("mujoco"), "MjModel"):
            raise
        raise MetarobotError(
            f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work here ({e}); unset it, or use egl, osmesa or disabled"
        ) from e
    del mujoco


def _again() -> str:
    arguments = sys.argv[1:]
    return " ".join(arguments if "--resume" in arguments else [*arguments, "--resume"])


def _agent_in(argv: Sequence[str]) -> str:
    """Find the agent's name among the arguments, before they are parsed: it decides which flags
    there are.
    """
    for i, word in enumerate(argv):
        if word.startswith("--agent="):
            return word.removeprefix("--agent=")
        if word == "--agent" and i + 1 < len(argv):
            return argv[i + 1]
    return "rl2"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[..., Any]] = {
        "families": families,
        "agents": agents,
        "evaluate": evaluate,
        "render": render,
        "compare": cli_compare.compare,
        "bench": cli_compare.bench,
        "sinusoid": sinusoid,
        "plot": plot,
        "publish": publish,
        "record": cli_demos.record,
        "shots": cli_demos.shots,
        "recognise": cli_likeness.recognise,
        **cli_robot.COMMANDS,
    }
    try:
        _check_gl()
        commands["train"] = _train_command(_agent_in(arguments))
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="metarobot", description="Meta-train robots that adapt.", args=arguments
        )
        sys.stdout.flush()
    except MetarobotError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
