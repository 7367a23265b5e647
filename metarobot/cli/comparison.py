"""The subcommand that compares agents."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tyro.conf import Positional

from metarobot import api
from metarobot.cli.main import INTERRUPTED
from metarobot.evaluation.compare import Job, PlanETA, parse_settings
from metarobot.evaluation.report import ComparisonReport
from metarobot.evaluation.tables import comparison_markdown
from metarobot.files import atomic_path
from metarobot.training.metrics_log import LINE_EVERY_S, summary_line
from metarobot.training.train import TrainingStopped


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
    """Compare agents on one family: equal steps of training each, and the same held-out tasks.

    Agents are trained, or found trained. Writes one table (terminal, Markdown, JSON) and one plot
    of return against episodes of experience. A policy without memory is also fine-tuned, if an
    agent that adapts by gradient steps is compared. Ctrl-C saves; the same command goes on from
    there. What has been trained or played before is not done again.

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
        episodes: Episodes in each task.
        seed: Draws the tasks and the starts; training seeds are ``seeds``.
        threads: CPU threads; 0 takes all there are.
        results: Folder for table and plot, FAMILY-compare-SPLIT; that of the runs if not given.
    """
    try:
        with PlanBar() as plan_bar:
            report = api.compare(
                family,
                agents,
                out=out,
                steps=steps,
                seeds=seeds,
                settings=parse_settings(settings),
                reuse=reuse,
                split=split,
                tasks=tasks,
                episodes=episodes,
                seed=seed,
                threads=threads,
                say=plan_bar.say,
                watch=plan_bar.watch,
                progress=plan_bar.show_playing,
            )
    except TrainingStopped:
        print("stopped and saved; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(report.table())
    _write_report(report, (out if results is None else results) / f"{family}-compare-{split}")


def _write_report(report: ComparisonReport, stem: Path) -> None:
    report.save(stem.with_suffix(".json"))
    with atomic_path(stem.with_suffix(".md")) as temporary:
        temporary.write_text(comparison_markdown(report.data))
    report.plot(stem.with_suffix(".png"))
    print(f"wrote {stem}.md, .json and .png")


class PlanBar:
    """Progress of a whole plan on standard error: a bar on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        self._last_line_s = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._is_terminal,
        )
        self._bar_task = self._bar.add_task("", total=None)
        self._total_steps = 0

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

    def watch(self, job: Job, metrics: Mapping[str, float], eta: PlanETA) -> None:
        """Show one iteration of one run."""
        self._total_steps = max(self._total_steps, eta.steps)
        done = f"{metrics['time/total_timesteps']:,.0f}/{job.train.steps:,}"
        left = f"whole plan: {eta.steps:,} steps left, ETA {eta.seconds:,.0f} s"
        line = f"{job.title}: {done} steps  {summary_line(dict(metrics))}  {left}"
        self._bar.update(
            self._bar_task,
            description=line,
            total=self._total_steps,
            completed=self._total_steps - eta.steps,
        )
        if not self._is_terminal and time.monotonic() - self._last_line_s > LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self.say(line)

    def show_playing(self, done: int, total: int) -> None:
        """Show how many trials were played."""
        self._bar.update(self._bar_task, description="playing", total=total, completed=done)
