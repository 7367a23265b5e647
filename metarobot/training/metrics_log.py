"""What training says while it runs: a progress bar, ``metrics.jsonl`` and TensorBoard, under SB3's
names and ours.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from metarobot.files import atomic_path
from metarobot.training.run_folder import CheckpointError

LINE_EVERY_S = 20.0


def summary_line(metrics: dict[str, float]) -> str:
    """Say the return of each episode of the trial, or the error left by who imitates, and the
    speed.
    """
    if "train/loss_before" in metrics:
        error = f"{metrics['train/loss_before']:.4f} → {metrics['train/loss']:.4f}"
        return f"{metrics['time/fps']:,.0f} steps/s  error {error}"
    episodes = [v for k, v in sorted(metrics.items()) if k.startswith("meta/return_episode_")]
    returns = " → ".join(f"{v:.1f}" for v in episodes)
    return f"{metrics['time/fps']:,.0f} steps/s  return {returns}"


class MetricsLog:
    """Writes each iteration's metrics everywhere; closes, or is left, cleanly."""

    def __init__(
        self, folder: Path, total: int, done: int, iteration: int, *, show: bool = True
    ) -> None:
        self.path = folder / "metrics.jsonl"
        drop_rows_after(self.path, iteration)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder), purge_step=done)
        console = Console(stderr=True)
        self._live = show and console.is_terminal
        self._lines = show and not console.is_terminal
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
            BarColumn(None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> MetricsLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        with suppress(OSError):  # a full disk has been reported by the write that met it
            self._file.close()
        with suppress(OSError):
            self._board.close()

    def write(self, metrics: dict[str, float]) -> None:
        """Take in one iteration."""
        steps = int(metrics["time/total_timesteps"])
        try:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._board.add_scalar(name, value, steps)
        except OSError as e:
            raise CheckpointError(f"cannot write {self.path}: {e.strerror or e}") from e
        self._bar.update(self._task, completed=steps, description=summary_line(metrics))
        if self._lines and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            total = self._bar.tasks[0].total or 1
            left = metrics["time/time_elapsed"] * (total / steps - 1)
            print(
                f"{steps:,}/{total:,.0f} steps  {summary_line(metrics)}  ETA {left:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    rows: list[dict[str, float]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def first_reach(
    rows: list[dict[str, float]], level: float, window: int = 10
) -> dict[str, float] | None:
    """Return the first row at which the last episode's return, averaged over ``window`` rows, is at
    least ``level``.
    """
    for i in range(window, len(rows) + 1):
        recent = rows[i - window : i]
        if sum(r["meta/post_adapt_return"] for r in recent) / window >= level:
            return recent[-1]
    return None


def drop_rows_after(path: Path, iteration: int) -> None:
    """Drop rows written after the checkpoint that training continues from."""
    rows = [r for r in read_metrics(path) if r["time/iterations"] <= iteration]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
