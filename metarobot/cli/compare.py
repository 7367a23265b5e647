"""``metarobot compare``: agents with each other, at equal steps and seeds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tyro.conf import Positional

from metarobot.cli.progress import bar

if TYPE_CHECKING:
    from metarobot.evaluation.compare import Job, PlanETA

LINE_EVERY_S = 20.0


def compare(
    family: Positional[str],
    /,
    out: Path = Path("runs"),
    agents: tuple[str, ...] = (),
    steps: float = 2e6,
    seeds: tuple[int, ...] = (0,),
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    reuse: tuple[Path, ...] = (),
    split: str = "test",
    tasks: int = 40,
    episodes: int = 2,
    seed: int = 0,
    threads: int = 0,
    results: Path | None = None,
) -> None:
    """Compare agents on one family: train each for equal steps, or find it trained, and play the
    same held-out tasks.

    Writes one table (terminal, Markdown, JSON) and one plot of return against episodes of
    experience. A policy without memory is also fine-tuned, if an agent that adapts by gradient
    steps is compared. Ctrl-C saves; the same command goes on from there. What has been trained or
    played before is not done again.

    Args:
        family: Task family; ``metarobot families`` lists them.
        out: Folder of the runs, FAMILY-AGENT-SEED each.
        agents: Kinds of agent; by default all that learn from their own trials.
        steps: Environment steps each agent trains for.
        seeds: Training seeds of each agent.
        settings: Settings of single agents as AGENT.NAME=VALUE, e.g. ``--set rl2.epochs=8
            pearl.steps=1e6``.
        reuse: Run folders, or folders of them, to take finished runs of the same settings and seed
            from.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks.
        episodes: Episodes lived in each task.
        seed: Draws the tasks and the starts; training seeds are ``seeds``.
        threads: CPU threads; 0 takes all there are.
        results: Folder for table and plot, FAMILY-compare-SPLIT; that of the runs if not given.
    """
    from metarobot.evaluation import tables
    from metarobot.evaluation.compare import (
        Plan,
        compare_runs,
        count_plays,
        parse_settings,
        train_plan,
    )
    from metarobot.evaluation.protocol import Protocol

    protocol = Protocol(split=split, tasks=tasks, episodes=episodes, seed=seed, threads=threads)
    whole = int(steps) if steps == steps and abs(steps) < 1e15 else -1
    plan = Plan(family=family, out=out, agents=agents, steps=whole, seeds=seeds, settings=parse_settings(settings),
                reuse=reuse, threads=threads)  # fmt: skip
    with PlanBar() as shown:
        runs = train_plan(plan, protocol, shown.say, shown.watch)
    if not runs:
        print("stopped and saved; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    with bar() as progress:
        task = progress.add_task("playing", total=count_plays(runs, protocol))
        report = compare_runs(plan, runs, protocol, lambda: progress.advance(task))
    print(tables.comparison_table(report))
    _write(report, (out if results is None else results) / f"{family}-compare-{split}")


def _write(report: dict[str, Any], stem: Path) -> None:
    from metarobot.evaluation import plots as plot
    from metarobot.evaluation import tables
    from metarobot.files import atomic_path, write_json

    write_json(stem.with_suffix(".json"), report)
    with atomic_path(stem.with_suffix(".md")) as temporary:
        temporary.write_text(tables.comparison_markdown(report))
    plot.plot_comparison(report, stem.with_suffix(".png"))
    print(f"wrote {stem}.md, .json and .png")


class PlanBar:
    """Progress over a whole plan: a bar on a terminal, a line now and then elsewhere; on standard
    error.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live, self._last_line = console.is_terminal, 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.percentage:.0f} %"),
        )
        self._bar = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not self._live
        )
        self._task = self._bar.add_task("", total=None)
        self._total = 0

    def __enter__(self) -> PlanBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(line, highlight=False, soft_wrap=True)

    def watch(self, job: Job, metrics: Mapping[str, float], outlook: PlanETA) -> None:
        """Take in one iteration of one run."""
        from metarobot.training.metrics_log import summary_line

        self._total = max(self._total, outlook.steps)
        done = f"{metrics['time/total_timesteps']:,.0f}/{job.train.steps:,}"
        left = f"whole plan: {outlook.steps:,} steps left, ETA {outlook.seconds:,.0f} s"
        line = f"{job.title}: {done} steps  {summary_line(dict(metrics))}  {left}"
        self._bar.update(
            self._task, description=line, total=self._total, completed=self._total - outlook.steps
        )
        if not self._live and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(line)
