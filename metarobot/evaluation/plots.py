"""Pictures of figures: adaptation curves of an evaluation, learning curves of runs. The only room
with matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metarobot.files import atomic_path
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import CheckpointError, Run

AGENT, ORACLE, BLIND, GREY = "#1f6feb", "#2da44e", "#8c959f", "#57606a"
TUNED = ("#bc4c00", "#d4a72c")
SUFFIXES = (".png", ".svg", ".pdf")


def adaptation(report: dict[str, Any], path: Path) -> None:
    """Plot return against episodes of experience, with 95 % bands, beside the baselines and
    controls it holds.

    Beside it, for agents that have them, how far beliefs about the task are off, and whether they
    are calibrated.
    """
    beliefs = report.get("beliefs")
    figure = _figure(width=15.0 if beliefs else 8.0)
    axes, *others = figure.subplots(1, 3 if beliefs else 1, squeeze=False)[0]
    rows = report["episodes"]
    x = [r["episode"] for r in rows]
    for name, colour in (("oracle", ORACLE), ("blind", BLIND)):
        if name in rows[0]:
            axes.plot(x, [r[name] for r in rows], "--", color=colour, label=name, lw=2)
            _band(axes, x, [r[f"{name}_ci95"] for r in rows], colour)
    for (name, control), marker in zip(report.get("controls", {}).items(), "x+", strict=False):
        axes.plot(
            x,
            [r["mean"] for r in control],
            ":",
            marker=marker,
            color=GREY,
            label=f"context {name}",
            lw=1.5,
        )
    for (name, baseline), colour in zip(report.get("finetuning", {}).items(), TUNED, strict=False):
        tuned = baseline["episodes"]
        axes.plot(
            x,
            [r["mean"] for r in tuned],
            "-s",
            color=colour,
            label=f"fine-tuned, {name}",
            lw=1.5,
            ms=4,
        )
        _band(axes, x, [r["ci95"] for r in tuned], colour)
    axes.plot(x, [r["mean"] for r in rows], "-o", color=AGENT, label=report["agent"], lw=2.5)
    _band(axes, x, [r["ci95"] for r in rows], AGENT)
    axes.set_xticks(
        x,
        [f"{r['episode']}\nscore {r['score']:.2f}" if "score" in r else r["episode"] for r in rows],
    )
    axes.margins(x=0.15, y=0.15)
    rollouts = report.get("rollouts", 1)
    each = f" ({rollouts} rollouts each)" if rollouts > 1 else ""
    axes.set_xlabel(f"episodes of experience in the task{each}")
    axes.set_ylabel("return of the next episode")
    seeds = len(report["seeds"])
    noun = "seed" if seeds == 1 else "seeds"
    axes.set_title(
        f"{report['family']}, {report['tasks']} {report['split']} tasks, {seeds} training {noun}",
        loc="left",
    )
    if beliefs:
        axes.legend(frameon=False, fontsize=8)
        _errors(others[0], beliefs)
        _calibration(others[1], beliefs)
    else:
        figure.legend(frameon=False, loc="outside right upper")
    _write(figure, path)


def _errors(axes: Any, beliefs: Mapping[str, Any]) -> None:
    """Plot how far the belief about each parameter is off, and the posterior's deviation, against
    experience.
    """
    rows = beliefs["episodes"]
    x = [r["episode"] for r in rows]
    axes.plot(
        x, [r["deviation"] for r in rows], "--", color=GREY, label="posterior's deviation", lw=2
    )
    _band(axes, x, [r["deviation_ci95"] for r in rows], GREY)
    for i, name in enumerate(beliefs["parameters"]):
        (line,) = axes.plot(x, [r["rmse"][i] for r in rows], "-o", label=name, ms=4)
        _band(axes, x, [r["rmse_ci95"][i] for r in rows], line.get_color())
    axes.set_xticks(x)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("episodes of experience in the task")
    axes.set_ylabel("RMSE, training range = [−1, 1]")
    axes.set_title("what it believes of the task", loc="left")
    axes.legend(frameon=False, fontsize=7)


def _calibration(axes: Any, beliefs: Mapping[str, Any]) -> None:
    """Plot how often central intervals of beliefs hold the truth against how often they say they
    do.
    """
    axes.plot([0, 1], [0, 1], ":", color=GREY, label="calibrated")
    rows = beliefs["episodes"]
    for k in sorted({0, len(rows) - 1}):
        held, bounds = rows[k]["coverage_all"], rows[k]["coverage_all_ci95"]
        x = [float(level) for level in held]
        colour = AGENT if k else BLIND
        axes.plot(
            x,
            list(held.values()),
            "-o",
            color=colour,
            label=f"after {rows[k]['episode']} episodes",
            ms=4,
        )
        _band(axes, x, list(bounds.values()), colour)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("central interval of the belief")
    axes.set_ylabel("share of tasks inside it")
    axes.set_title("calibration", loc="left")
    axes.legend(frameon=False, fontsize=8)


def comparison(report: Mapping[str, Any], path: Path) -> None:
    """Plot return against episodes of experience for every agent compared, with 95 % intervals,
    best first.
    """
    figure = _figure(width=9.0)
    axes = figure.subplots()
    colours = iter(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    known = {"oracle": ORACLE, "blind": BLIND}
    agents = sorted(report["agents"].items(), key=lambda x: -x[1]["episodes"][-1]["mean"])
    for i, (name, entry) in enumerate(agents):
        rows, colour = entry["episodes"], known.get(name) or next(colours)
        # side by side, so that intervals can be told apart
        x = [r["episode"] + 0.02 * (i - len(agents) / 2) for r in rows]
        means = [r["mean"] for r in rows]
        bounds = [[abs(r["ci95"][side] - r["mean"]) for r in rows] for side in (0, 1)]
        dashed = "--" if name in known or entry["privileged"] else "-"
        axes.errorbar(
            x,
            means,
            bounds,
            fmt=f"{dashed}o",
            color=colour,
            label=f"{name}  {means[-1]:.0f}",
            capsize=2,
            ms=4,
        )
    axes.set_xticks(range(len(agents[0][1]["episodes"])))
    axes.set_xlabel("episodes of experience in the task")
    axes.set_ylabel("return of the next episode")
    axes.grid(axis="y", alpha=0.25)
    seeds = ", ".join(map(str, report["seeds"]))
    axes.set_title(
        f"{report['family']}, {report['tasks']} {report['split']} tasks, training seeds {seeds}",
        loc="left",
    )
    figure.legend(
        frameon=False, loc="outside right upper", title="return of the last episode", fontsize=8
    )
    _write(figure, path)


def learning(runs: Sequence[Run], path: Path) -> None:
    """Plot the return of the trial's last episode, with exploration noise, over wall time and over
    steps.
    """
    for run in runs:
        if any(
            "meta/post_adapt_return" not in r for r in read_metrics(run.folder / "metrics.jsonl")
        ):
            raise CheckpointError(
                f"{run.folder} has no returns to plot: it learned from demonstrations"
            )
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
                [r[key] / scale for r in rows],
                [r["meta/post_adapt_return"] for r in rows],
                lw=1.2,
                label=run.name,
            )
        axes.set_xlabel(unit)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("return of the trial's last episode")
    figure.axes[0].legend(frameon=False)
    _write(figure, path)


def regression(
    x: Any, truth: Any, seen: Any, curves: Mapping[str, Any], errors: Mapping[str, Any], path: Path
) -> None:
    """Plot what networks make of a function of which a few points are seen, and their errors over
    gradient steps.

    ``x``, ``truth`` ``(point,)``; ``seen``: x and y of the points seen; ``curves``: name ->
    predictions ``(step, point)``; ``errors``: name -> mean squared errors ``(step,)``.
    """
    figure = _figure(width=12.0)
    *left, right = figure.subplots(1, len(curves) + 1)
    for axes, (name, steps) in zip(left, curves.items(), strict=True):
        axes.plot(x, truth, color=GREY, lw=1, label="truth")
        for step, style in ((0, ":"), (1, "-"), (len(steps) - 1, "--")):
            colour = BLIND if step == 0 else AGENT
            axes.plot(
                x,
                steps[step],
                style,
                color=colour,
                label=f"{step} gradient steps" if step != 1 else "1 step",
            )
        axes.plot(*seen, "^", color=TUNED[0], ms=6, label="points seen")
        axes.set_title(name, loc="left")
        axes.set_ylim(-8, 6)
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")
    for (name, error), colour in zip(errors.items(), (AGENT, TUNED[0]), strict=True):
        right.semilogy(range(len(error)), error, "-o", color=colour, label=name, ms=4)
    right.set_xlabel("gradient steps on the points seen")
    right.set_title("mean squared error on new tasks", loc="left")
    right.legend(frameon=False)
    _write(figure, path)


def likeness(report: Mapping[str, Any], colour: str, path: Path) -> None:
    """Plot prototypes and held-out tasks in the plane in which prototypes vary most, coloured by
    one parameter.
    """
    figure = _figure(width=8.0)
    axes = figure.subplots()
    known = [r for r in report["held_out"] if not r["new"]]
    new = [r for r in report["held_out"] if r["new"]]
    every = [r["task"][colour] for r in (*report["prototypes"], *report["held_out"])]
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": min(every), "vmax": max(every)}
    styles: tuple[tuple[Any, dict[str, Any]], ...] = (
        (
            report["prototypes"],
            {"label": "prototypes of training tasks", "s": 18, "alpha": 0.6, "lw": 0},
        ),
        (
            known,
            {
                "label": f"{report['split']} tasks, known",
                "marker": "o",
                "s": 70,
                "edgecolors": "black",
            },
        ),
        (
            new,
            {
                "label": f"{report['split']} tasks, new",
                "marker": "X",
                "s": 90,
                "edgecolors": TUNED[0],
            },
        ),
    )
    for rows, style in styles:
        x, y = zip(*(r["xy"] for r in rows), strict=True) if rows else ((), ())
        drawn = axes.scatter(x, y, c=[r["task"][colour] for r in rows], **scale, **style)
    figure.colorbar(drawn, ax=axes, label=colour.replace("_", " "))
    axes.set_aspect("equal", "datalim")
    axes.set_xlabel("first principal direction of the prototypes")
    axes.set_ylabel("second")
    axes.set_title(
        f"{report['family']}: embeddings of {report['transitions']} transitions", loc="left"
    )
    axes.legend(frameon=False, fontsize=8)
    _write(figure, path)


def check_suffix(path: Path) -> None:
    """Raise for a file that is no picture."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"cannot plot to {str(path)!r}: its name must end in one of {', '.join(SUFFIXES)}"
        )


def _figure(width: float = 6.4) -> Figure:
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _band(axes: Any, x: Sequence[float], bounds: Sequence[Sequence[float]], colour: str) -> None:
    axes.fill_between(
        x, [b[0] for b in bounds], [b[1] for b in bounds], color=colour, alpha=0.18, lw=0
    )


def _write(figure: Figure, path: Path) -> None:
    check_suffix(path)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
