"""The command line of likeness: which tasks an agent takes a new one for."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from metarobot.cli.progress import bar


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
    """Show which training tasks each new task is most like, and measure how well new tasks are told
    apart.

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
    from metarobot.evaluation import plots as drawing
    from metarobot.evaluation import tables
    from metarobot.evaluation.task_recognition import RecognitionConfig, check_parameter
    from metarobot.evaluation.task_recognition import recognise as measure
    from metarobot.training import run_folder as checkpoint

    opened = checkpoint.open_run(run)
    colour = check_parameter(opened.family.space, colour)
    if plot is not None:
        drawing.check_suffix(plot)
    lived = {"tasks": tasks, "transitions": transitions, "support": support, "queries": queries}
    quiz = RecognitionConfig(
        split=split, even=even, neighbours=neighbours, seed=seed, threads=threads, **lived
    )
    with bar() as progress:
        task = progress.add_task("playing", total=support + queries)
        report = measure(opened, quiz, tick=lambda: progress.advance(task))
    print(tables.recognition_table(report, prototypes))
    if json is not None:
        from metarobot.files import write_json

        write_json(json, report)
    if plot is not None:
        drawing.plot_recognition(report, colour, plot)
