"""Metrics of a training: a progress bar, ``metrics.jsonl`` and TensorBoard.

Names are Stable-Baselines3's where it has them, and ours.
"""

from __future__ import annotations

import json
import math
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
from metarobot.learning.finite_check import DivergedError
from metarobot.training.run_files import CheckpointError

LINE_EVERY_S = 20.0
"""Seconds between two lines where standard error is no terminal."""


def summary_line(metrics: dict[str, float]) -> str:
    """Return one iteration in a line: its speed, and returns or imitation errors."""
    speed = f"{metrics['time/fps']:,.0f} steps/s"
    if "train/loss_before" in metrics:
        error = f"{metrics['train/loss_before']:.4f} → {metrics['train/loss']:.4f}"
        return f"{speed}  error {error}"
    # By number: the tenth episode comes after the second.
    episodes: list[float] = []
    while (name := f"meta/return_episode_{len(episodes) + 1}") in metrics:
        episodes.append(metrics[name])
    returns = " → ".join(f"{v:.1f}" for v in episodes)
    return f"{speed}  return {returns}"


class MetricsLog:
    """Writes the metrics of each iteration everywhere; a context manager."""

    def __init__(
        self, folder: Path, total: int, done: int, iteration: int, *, show: bool = True
    ) -> None:
        """Open the log of a run folder.

        Args:
            folder: The run folder.
            total: Environment steps of the whole training.
            done: Steps collected before, where TensorBoard's curves go on.
            iteration: Iterations before; rows of later ones are dropped.
            show: Whether to show progress on standard error.
        """
        self.path = folder / "metrics.jsonl"
        drop_rows_after(self.path, iteration)
        self._file = self.path.open("a")
        # TensorBoard hides what was written after the checkpoint.
        self._board = SummaryWriter(str(folder), purge_step=done)

        # A bar on a terminal, a line now and then in a log file.
        console = Console(stderr=True)
        shows_bar = show and console.is_terminal
        self._shows_lines = show and not console.is_terminal
        self._last_line_s = 0.0
        self._total = total
        self._bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
            BarColumn(None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not shows_bar,
        )
        self._bar_task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> MetricsLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        # The log itself says why it ends.
        if isinstance(error, DivergedError):
            with suppress(OSError):
                self._file.write(json.dumps({"error": str(error)}) + "\n")
        # A full disk was reported by the write that met it.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._board.close()

    def write(self, metrics: dict[str, float]) -> None:
        """Write the metrics of one iteration.

        Raises:
            CheckpointError: The operating system refuses to write.
        """
        steps = int(metrics["time/total_timesteps"])
        try:
            # JSON has no NaN: the norm of a gradient that was not followed is null.
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()  # a kill loses no iteration
            for name, value in metrics.items():
                self._board.add_scalar(name, value, steps)
        except OSError as e:
            raise CheckpointError(f"cannot write {self.path}: {e.strerror or e}") from e

        self._bar.update(self._bar_task, completed=steps, description=summary_line(metrics))
        if self._shows_lines and time.monotonic() - self._last_line_s > LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._print_line(steps, metrics)

    def _print_line(self, steps: int, metrics: dict[str, float]) -> None:
        left_s = metrics["time/time_elapsed"] * (self._total / steps - 1)
        print(
            f"{steps:,}/{self._total:,.0f} steps  {summary_line(metrics)}  ETA {left_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``metrics.jsonl``, one an iteration.

    A last line that was cut short by a kill is left out, and so is why a training diverged; no file
    gives no rows.
    """
    rows: list[dict[str, float]] = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        if "error" not in row:
            rows.append(row)
    return rows


def first_reach(
    rows: list[dict[str, float]], level: float, window: int = 10
) -> dict[str, float] | None:
    """Return the first row at which the moving average of the last episode's return is ``level``.

    The average is over ``window`` rows. None if it never comes so high.
    """
    for end in range(window, len(rows) + 1):
        recent = rows[end - window : end]
        total = sum(row["meta/post_adapt_return"] for row in recent)
        if total / window >= level:
            return recent[-1]
    return None


def drop_rows_after(path: Path, iteration: int) -> None:
    """Drop rows that were written after the checkpoint from which training continues."""
    rows = [row for row in read_metrics(path) if row["time/iterations"] <= iteration]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
