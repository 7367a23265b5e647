"""Pictures of figures: adaptation curves of an evaluation, learning curves of runs. The only room with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metarobot.checkpoint import CheckpointError, Run, replacing
from metarobot.log import read_metrics

AGENT, ORACLE, BLIND, GREY = "#1f6feb", "#2da44e", "#8c959f", "#57606a"
SUFFIXES = (".png", ".svg", ".pdf")


def adaptation(report: dict[str, Any], path: Path) -> None:
    """Plot return against episodes of experience, with 95 % bands, beside the baselines and controls it holds."""
    figure = _figure()
    axes = figure.subplots()
    rows = report["episodes"]
    x = [r["episode"] for r in rows]
    for name, colour in (("oracle", ORACLE), ("blind", BLIND)):
        if name in rows[0]:
            axes.plot(x, [r[name] for r in rows], "--", color=colour, label=name, lw=2)
            _band(axes, x, [r[f"{name}_ci95"] for r in rows], colour)
    for (name, control), marker in zip(report.get("controls", {}).items(), "x+", strict=False):
        axes.plot(x, [r["mean"] for r in control], ":", marker=marker, color=GREY, label=f"context {name}", lw=1.5)
    axes.plot(x, [r["mean"] for r in rows], "-o", color=AGENT, label=report["agent"], lw=2.5)
    _band(axes, x, [r["ci95"] for r in rows], AGENT)
    axes.set_xticks(x, [f"{r['episode']}\nscore {r['score']:.2f}" if "score" in r else r["episode"] for r in rows])
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("episodes of experience in the task")
    axes.set_ylabel("return of the next episode")
    seeds = len(report["seeds"])
    noun = "seed" if seeds == 1 else "seeds"
    axes.set_title(
        f"{report['family']}, {report['tasks']} {report['split']} tasks, {seeds} training {noun}", loc="left"
    )
    axes.legend(frameon=False)
    _write(figure, path)


def learning(runs: Sequence[Run], path: Path) -> None:
    """Plot the return of the trial's last episode, with exploration noise, over wall time and over steps."""
    figure = _figure(width=10.0)
    for axes, key, unit, scale in zip(
        figure.subplots(1, 2, sharey=True),
        ("time/time_elapsed", "time/total_timesteps"),
        ("training time (minutes)", "environment steps (millions)"),
        (60.0, 1e6),
        strict=True,
    ):
        for run in runs:
            rows = read_metrics(run.folder / "metrics.jsonl")
            axes.plot(
                [r[key] / scale for r in rows], [r["meta/post_adapt_return"] for r in rows], lw=1.2, label=run.name
            )
        axes.set_xlabel(unit)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("return of the trial's last episode")
    figure.axes[0].legend(frameon=False)
    _write(figure, path)


def check_suffix(path: Path) -> None:
    """Raise for a file that is no picture."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"cannot plot to {str(path)!r}: its name must end in one of {', '.join(SUFFIXES)}")


def _figure(width: float = 6.4) -> Figure:
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _band(axes: Any, x: Sequence[float], bounds: Sequence[Sequence[float]], colour: str) -> None:
    axes.fill_between(x, [b[0] for b in bounds], [b[1] for b in bounds], color=colour, alpha=0.18, lw=0)


def _write(figure: Figure, path: Path) -> None:
    check_suffix(path)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary)
