"""Subcommands of demonstrations: recording them, and measuring who imitates them."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from metarobot import api
from metarobot.cli.progress import make_bar
from metarobot.training.demonstrations import read_demonstrations, record_demonstrations


def record(
    family: Positional[str],
    /,
    out: Path,
    split: str = "train",
    tasks: int = 100,
    shots: int = 2,
    seed: int = 0,
    jitter: float = 0.0,
    threads: int = 0,
) -> None:
    """Record a family's scripted expert as a Minari dataset, for agents that imitate.

    Args:
        family: Task family with an expert, e.g. Placement.
        out: Folder to write the dataset to.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        shots: Demonstrations of every variant of a task; training takes some to adapt to and as
            many to match.
        seed: Draws the tasks and the starts.
        jitter: Deviation of normal noise on what the expert does; what it asked for is recorded, so
            that whoever imitates it sees how to come back.
        threads: Physics threads; 0 takes all there are.
    """
    known = api.family(family)
    per_task = shots * known.interaction.variants
    with make_bar() as bar:
        bar_task = bar.add_task("recording", total=tasks * per_task)
        count = record_demonstrations(
            known,
            out,
            split=split,
            tasks=tasks,
            shots=shots,
            seed=seed,
            jitter=jitter,
            threads=threads,
            tick=lambda written: bar.update(bar_task, completed=written),
        )
    left_out = tasks - count // per_task
    note = f" ({left_out} left out, in which the expert kept failing)" if left_out else ""
    print(f"wrote {count:,} demonstrations of {tasks - left_out:,} tasks to {out}{note}")


def shots(
    run: Positional[str],
    /,
    demos: Path,
    shots: tuple[int, ...] = (1, 5),
    reference: str | None = None,
    seed: int = 0,
    threads: int = 0,
    json: Path | None = None,
) -> None:
    """Measure few-shot imitation: the success rate after so many demonstrations of each variant.

    Args:
        run: Run folder of an agent that imitates, or a trained one in the box.
        demos: Minari dataset of demonstrations of the tasks to be tested in, e.g. of unseen
            classes.
        shots: Numbers of demonstrations of every variant to adapt to.
        reference: Run of an agent that is shown the answer.
        seed: Draws the starts.
        threads: Physics threads; 0 takes all there are.
        json: Where to write the report.
    """
    from metarobot.evaluation.few_shot_imitation import few_shot
    from metarobot.evaluation.tables import few_shot_table
    from metarobot.training.run_folder import open_run

    opened = open_run(run)
    reference_run = None if reference is None else open_run(reference)
    with make_bar() as bar:
        bar_task = bar.add_task("playing", total=1 + len(shots))
        report = few_shot(
            opened,
            read_demonstrations(demos, opened.family),
            shots=shots,
            reference=reference_run,
            seed=seed,
            threads=threads,
            tick=lambda: bar.advance(bar_task),
        )
    print(few_shot_table(report))
    if json is not None:
        from metarobot.files import write_json

        write_json(json, report)
