"""Subcommands that show what trained agents can do."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from metarobot import api
from metarobot.cli.progress import make_bar, progress_bar
from metarobot.errors import MetarobotError


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
    """Measure how an agent adapts on held-out tasks: its return after 0, 1, … episodes.

    Beside it stand, where they are given, an oracle, a blind policy and fine-tuned policies.

    Args:
        runs: Run folders or trained agents in the box; several of one family are training seeds of
            one method.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        episodes: Episodes in each task; an agent that adapts between them, as maml does, has
            adapted 0, 1, 2, … times in them, each time to all of its rollouts.
        seed: Draws the tasks and the starts.
        quiet: Play the last episode without noise, also with agents that need noise to adapt.
        threads: Physics threads; 0 takes all there are.
        oracle: Runs of the upper reference, shown the task.
        blind: Runs of the lower reference, which cannot adapt.
        finetune: Policies trained as ppo or blind, to be fine-tuned with the episodes and gradient
            steps that the runs adapt with; untrained weights too. The step size of each is tuned on
            training tasks.
        controls: Also play with the context cleared, or swapped for another task's, after each
            episode.
        robot: Another model of the robot than the agents were trained on: a path to an MJCF, or
            menagerie:name.
        json: Where to write the report.
        plot: Where to draw the curves (.png, .svg or .pdf).
    """
    _check_picture(plot)
    with progress_bar("playing") as progress:
        report = api.evaluate(
            runs,
            split=split,
            tasks=tasks,
            episodes=episodes,
            seed=seed,
            quiet=quiet,
            threads=threads,
            oracle=oracle,
            blind=blind,
            finetune=finetune,
            controls=controls,
            robot=robot,
            progress=progress,
        )
    print(report.table())
    if json is not None:
        report.save(json)
    if plot is not None:
        report.plot(plot)


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
    from metarobot.tasks.space import parse_assignments

    api.render(
        run,
        out,
        split=split,
        tasks=tasks,
        episodes=episodes,
        seed=seed,
        task=parse_assignments(task) if task else None,
        robot=robot,
        size=size,
        fps=fps,
    )
    print(f"wrote {out}")


def recognise(
    run: Positional[str],
    /,
    split: str = "test",
    tasks: int = 20,
    even: bool = False,
    transitions: int = 50,
    neighbours: int = 5,
    support: int = 5,
    queries: int = 5,
    seed: int = 0,
    threads: int = 0,
    prototypes: bool = False,
    colour: str = "",
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Show which training tasks held-out tasks are most like, and how well they are told apart.

    Args:
        run: Run folder of an agent that keeps prototypes: train --agent prototype.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        even: Space the tasks evenly over the training range of the family's one parameter instead
            of drawing them.
        transitions: First transitions of a fresh episode that a task is recognised from.
        neighbours: Prototypes to name for each task, the nearest.
        support: Episodes whose first transitions make a prototype of each of these tasks too.
        queries: Fresh episodes of each task, whose first transitions are assigned to the nearest of
            these.
        seed: Draws the tasks and the starts.
        threads: Physics threads; 0 takes all there are.
        prototypes: Also list the support set: every prototype, its task, and how far its windows
            lie from it.
        colour: Parameter that colours the plot; the first if not given.
        json: Where to write the report, with all prototypes.
        plot: Where to draw prototypes and tasks in the plane in which prototypes vary most (.png,
            .svg or .pdf).
    """
    from metarobot.evaluation.tables import recognition_table
    from metarobot.evaluation.task_recognition import RecognitionConfig, check_parameter
    from metarobot.evaluation.task_recognition import recognise as measure
    from metarobot.training.run_folder import open_run

    opened = open_run(run)
    colour_parameter = check_parameter(opened.family.space, colour)
    _check_picture(plot)
    config = RecognitionConfig(
        split=split,
        tasks=tasks,
        even=even,
        transitions=transitions,
        neighbours=neighbours,
        support=support,
        queries=queries,
        seed=seed,
        threads=threads,
    )
    with make_bar() as bar:
        bar_task = bar.add_task("playing", total=support + queries)
        report = measure(opened, config, tick=lambda: bar.advance(bar_task))
    print(recognition_table(report, prototypes))
    if json is not None:
        from metarobot.files import write_json

        write_json(json, report)
    if plot is not None:
        from metarobot.evaluation.plots import plot_recognition

        plot_recognition(report, colour_parameter, plot)


def sinusoid(
    out: Path = Path("sinusoid.png"),
    iterations: int | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Explain MAML with a picture: regress a sine wave from ten points by one gradient step.

    The example of Finn et al. (2017), trained here in about two minutes by the inner loop that
    adapts robots: MAML beside one network trained jointly on all waves, both fine-tuned in the same
    way.

    Args:
        out: Picture to write (.png, .svg or .pdf).
        iterations: Outer steps; by default as many as make a good picture.
        seed: Draws everything.
        json: Where to write the errors.
    """
    from metarobot.evaluation.plots import plot_regression
    from metarobot.evaluation.sinusoid_example import SinusoidConfig, compare
    from metarobot.files import write_json

    _check_picture(out)
    config = SinusoidConfig(seed=seed)
    if iterations is not None:
        if iterations < 1:
            raise MetarobotError(f"iterations must be at least 1, not {iterations}")
        config = SinusoidConfig(seed=seed, iterations=iterations)

    with make_bar() as bar:
        bar_tasks = {
            name: bar.add_task(name, total=config.iterations) for name in ("MAML", "joint training")
        }

        def show(name: str, iteration: int, error: float) -> None:
            bar.update(bar_tasks[name], completed=iteration + 1)

        result = compare(config, show)

    for name, errors in result.errors.items():
        listed = ", ".join(f"{error:.3f}" for error in errors)
        print(f"{name}: mean squared error after 0, 1, … gradient steps: {listed}")
    plot_regression(result.x, result.truth, result.support, result.curves, result.errors, out)
    if json is not None:
        write_json(json, {"iterations": config.iterations, "seed": seed, "errors": result.errors})
    print(f"wrote {out}")


def _check_picture(path: Path | None) -> None:
    """Check the suffix of a picture before anything is played.

    Raises:
        MetarobotError: A suffix that no picture has.
    """
    if path is not None:
        from metarobot.evaluation.plots import check_suffix

        check_suffix(path)
