"""Plots of reports and learning curves; only this module imports matplotlib's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metarobot.files import atomic_path
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_files import CheckpointError
from metarobot.training.run_folder import Run

AGENT_COLOUR = "#1f6feb"
ORACLE_COLOUR = "#2da44e"
BLIND_COLOUR = "#8c959f"
CONTROL_COLOUR = "#57606a"
FINE_TUNED_COLOURS = ("#bc4c00", "#d4a72c")

SUFFIXES = (".png", ".svg", ".pdf")
"""Files that can be drawn to."""

FIGURE_HEIGHT_IN = 4.2


def plot_evaluation(report: Mapping[str, Any], path: Path) -> None:
    """Plot return against episodes of experience, with 95 % bands, baselines and controls.

    Agents that infer a posterior get two more panels: the errors of their beliefs about the task,
    and whether these beliefs are calibrated.
    """
    beliefs = report.get("beliefs")
    figure = _new_figure(width_in=15.0 if beliefs else 8.0)
    axes, *belief_axes = figure.subplots(1, 3 if beliefs else 1, squeeze=False)[0]

    rows = report["episodes"]
    episodes = [row["episode"] for row in rows]

    for name, colour in (("oracle", ORACLE_COLOUR), ("blind", BLIND_COLOUR)):
        if name in rows[0]:
            means = [row[name] for row in rows]
            axes.plot(episodes, means, "--", color=colour, label=name, lw=2)
            _draw_band(axes, episodes, [row[f"{name}_ci95"] for row in rows], colour)

    for (name, control), marker in zip(report.get("controls", {}).items(), "x+", strict=False):
        means = [row["mean"] for row in control]
        label = f"context {name}"
        axes.plot(episodes, means, ":", marker=marker, color=CONTROL_COLOUR, label=label, lw=1.5)

    baselines = report.get("finetuning", {}).items()
    for (name, baseline), colour in zip(baselines, FINE_TUNED_COLOURS, strict=False):
        means = [row["mean"] for row in baseline["episodes"]]
        bounds = [row["ci95"] for row in baseline["episodes"]]
        label = f"fine-tuned, {name}"
        axes.plot(episodes, means, "-s", color=colour, label=label, lw=1.5, ms=4)
        _draw_band(axes, episodes, bounds, colour)

    # The agent itself comes last, on top of everything else.
    means = [row["mean"] for row in rows]
    axes.plot(episodes, means, "-o", color=AGENT_COLOUR, label=report["agent"], lw=2.5)
    _draw_band(axes, episodes, [row["ci95"] for row in rows], AGENT_COLOUR)

    labels = []
    for row in rows:
        score = f"\nscore {row['score']:.2f}" if "score" in row else ""
        labels.append(f"{row['episode']}{score}")
    axes.set_xticks(episodes, labels)
    axes.margins(x=0.15, y=0.15)

    rollouts = report.get("rollouts", 1)
    rollout_note = f" ({rollouts} rollouts each)" if rollouts > 1 else ""
    axes.set_xlabel(f"episodes of experience in the task{rollout_note}")
    axes.set_ylabel("return of the next episode")

    seeds = len(report["seeds"])
    noun = "seed" if seeds == 1 else "seeds"
    axes.set_title(
        f"{report['family']}, {report['tasks']} {report['split']} tasks, {seeds} training {noun}",
        loc="left",
    )

    if beliefs:
        axes.legend(frameon=False, fontsize=8)
        _draw_belief_errors(belief_axes[0], beliefs)
        _draw_calibration(belief_axes[1], beliefs)
    else:
        figure.legend(frameon=False, loc="outside right upper")
    _save_figure(figure, path)


def _draw_belief_errors(axes: Any, beliefs: Mapping[str, Any]) -> None:
    """Draw the RMSE of the belief about each parameter, and the posterior's deviation."""
    rows = beliefs["episodes"]
    episodes = [row["episode"] for row in rows]

    deviations = [row["deviation"] for row in rows]
    label = "posterior's deviation"
    axes.plot(episodes, deviations, "--", color=CONTROL_COLOUR, label=label, lw=2)
    _draw_band(axes, episodes, [row["deviation_ci95"] for row in rows], CONTROL_COLOUR)

    for i, name in enumerate(beliefs["parameters"]):
        errors = [row["rmse"][i] for row in rows]
        (line,) = axes.plot(episodes, errors, "-o", label=name, ms=4)
        _draw_band(axes, episodes, [row["rmse_ci95"][i] for row in rows], line.get_color())

    axes.set_xticks(episodes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("episodes of experience in the task")
    axes.set_ylabel("RMSE, training range = [−1, 1]")
    axes.set_title("what it believes of the task", loc="left")
    axes.legend(frameon=False, fontsize=7)


def _draw_calibration(axes: Any, beliefs: Mapping[str, Any]) -> None:
    """Draw the coverage of the beliefs' central intervals against their nominal level."""
    axes.plot([0, 1], [0, 1], ":", color=CONTROL_COLOUR, label="calibrated")

    rows = beliefs["episodes"]
    first_and_last = sorted({0, len(rows) - 1})
    for k in first_and_last:
        coverage = rows[k]["coverage_all"]
        levels = [float(level) for level in coverage]
        colour = AGENT_COLOUR if k > 0 else BLIND_COLOUR
        label = f"after {rows[k]['episode']} episodes"
        axes.plot(levels, list(coverage.values()), "-o", color=colour, label=label, ms=4)
        _draw_band(axes, levels, list(rows[k]["coverage_all_ci95"].values()), colour)

    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("central interval of the belief")
    axes.set_ylabel("share of tasks inside it")
    axes.set_title("calibration", loc="left")
    axes.legend(frameon=False, fontsize=8)


def plot_comparison(report: Mapping[str, Any], path: Path) -> None:
    """Plot return against episodes of experience for every agent compared, best first."""
    figure = _new_figure(width_in=9.0)
    axes = figure.subplots()
    colours = iter(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    reference_colours = {"oracle": ORACLE_COLOUR, "blind": BLIND_COLOUR}
    agents = sorted(report["agents"].items(), key=lambda item: -item[1]["episodes"][-1]["mean"])

    for i, (name, entry) in enumerate(agents):
        rows = entry["episodes"]
        colour = reference_colours.get(name) or next(colours)
        # Agents stand a little apart, so that overlapping intervals can be told from each other.
        shift = 0.02 * (i - len(agents) / 2)
        x = [row["episode"] + shift for row in rows]
        means = [row["mean"] for row in rows]
        below = [abs(row["ci95"][0] - row["mean"]) for row in rows]
        above = [abs(row["ci95"][1] - row["mean"]) for row in rows]
        dashed = name in reference_colours or entry["privileged"]
        axes.errorbar(
            x,
            means,
            [below, above],
            fmt="--o" if dashed else "-o",
            color=colour,
            label=f"{name}  {means[-1]:.0f}",
            capsize=2,
            ms=4,
        )

    axes.set_xticks(range(len(agents[0][1]["episodes"])))
    axes.set_xlabel("episodes of experience in the task")
    axes.set_ylabel("return of the next episode")
    axes.grid(axis="y", alpha=0.25)

    seeds = ", ".join(str(seed) for seed in report["seeds"])
    axes.set_title(
        f"{report['family']}, {report['tasks']} {report['split']} tasks, training seeds {seeds}",
        loc="left",
    )
    figure.legend(
        frameon=False, loc="outside right upper", title="return of the last episode", fontsize=8
    )
    _save_figure(figure, path)


def plot_learning_curves(runs: Sequence[Run], path: Path) -> None:
    """Plot the return of a trial's last episode over wall time and over environment steps.

    These are returns with exploration noise, as training logs them.

    Raises:
        CheckpointError: A run that logs no returns, or a file that is no picture.
    """
    metrics = {run.folder: read_metrics(run.folder / "metrics.jsonl") for run in runs}
    for folder, rows in metrics.items():
        if any("meta/post_adapt_return" not in row for row in rows):
            raise CheckpointError(
                f"{folder} has no returns to plot: it learned from demonstrations"
            )

    figure = _new_figure(width_in=10.0)
    time_axes, step_axes = figure.subplots(1, 2, sharey=True)
    panels = (
        (time_axes, "time/time_elapsed", 60.0, "training time (minutes)"),
        (step_axes, "time/total_timesteps", 1e6, "environment steps (millions)"),
    )
    for axes, key, unit, label in panels:
        for run in runs:
            rows = metrics[run.folder]
            x = [row[key] / unit for row in rows]
            returns = [row["meta/post_adapt_return"] for row in rows]
            axes.plot(x, returns, lw=1.2, label=run.name)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)

    time_axes.set_ylabel("return of the trial's last episode")
    time_axes.legend(frameon=False)
    _save_figure(figure, path)


def plot_regression(
    x: Any, truth: Any, seen: Any, curves: Mapping[str, Any], errors: Mapping[str, Any], path: Path
) -> None:
    """Plot how networks fit a function from a few of its points, and their errors.

    Args:
        x: Points at which the function is drawn, ``(point,)``.
        truth: The function there, ``(point,)``.
        seen: x and y of the points that networks are fitted to.
        curves: Network -> its predictions after each gradient step, ``(step, point)``.
        errors: Network -> mean squared error on new tasks after each gradient step, ``(step,)``.
        path: Picture to write.
    """
    figure = _new_figure(width_in=12.0)
    *curve_axes, error_axes = figure.subplots(1, len(curves) + 1)

    for axes, (name, predictions) in zip(curve_axes, curves.items(), strict=True):
        axes.plot(x, truth, color=CONTROL_COLOUR, lw=1, label="truth")
        last_step = len(predictions) - 1
        for step, style in ((0, ":"), (1, "-"), (last_step, "--")):
            colour = BLIND_COLOUR if step == 0 else AGENT_COLOUR
            label = "1 step" if step == 1 else f"{step} gradient steps"
            axes.plot(x, predictions[step], style, color=colour, label=label)
        axes.plot(*seen, "^", color=FINE_TUNED_COLOURS[0], ms=6, label="points seen")
        axes.set_title(name, loc="left")
        axes.set_ylim(-8, 6)
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")

    error_colours = (AGENT_COLOUR, FINE_TUNED_COLOURS[0])
    for (name, error), colour in zip(errors.items(), error_colours, strict=True):
        error_axes.semilogy(range(len(error)), error, "-o", color=colour, label=name, ms=4)
    error_axes.set_xlabel("gradient steps on the points seen")
    error_axes.set_title("mean squared error on new tasks", loc="left")
    error_axes.legend(frameon=False)
    _save_figure(figure, path)


def plot_recognition(report: Mapping[str, Any], colour_parameter: str, path: Path) -> None:
    """Plot embeddings of training and held-out tasks, coloured by one task parameter.

    The plane is that of the two directions in which the prototypes vary most.
    """
    figure = _new_figure(width_in=8.0)
    axes = figure.subplots()

    known = [row for row in report["held_out"] if not row["new"]]
    unknown = [row for row in report["held_out"] if row["new"]]
    everything = [*report["prototypes"], *report["held_out"]]
    values = [row["task"][colour_parameter] for row in everything]
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": min(values), "vmax": max(values)}

    prototype_style: dict[str, Any] = {
        "label": "prototypes of training tasks",
        "s": 18,
        "alpha": 0.6,
        "lw": 0,
    }
    known_style: dict[str, Any] = {
        "label": f"{report['split']} tasks, known",
        "marker": "o",
        "s": 70,
        "edgecolors": "black",
    }
    unknown_style: dict[str, Any] = {
        "label": f"{report['split']} tasks, unknown",
        "marker": "X",
        "s": 90,
        "edgecolors": FINE_TUNED_COLOURS[0],
    }
    groups = (
        (report["prototypes"], prototype_style),
        (known, known_style),
        (unknown, unknown_style),
    )
    for rows, style in groups:
        x = [row["xy"][0] for row in rows]
        y = [row["xy"][1] for row in rows]
        colours = [row["task"][colour_parameter] for row in rows]
        points = axes.scatter(x, y, c=colours, **scale, **style)

    figure.colorbar(points, ax=axes, label=colour_parameter.replace("_", " "))
    axes.set_aspect("equal", "datalim")
    axes.set_xlabel("first principal direction of the prototypes")
    axes.set_ylabel("second")
    axes.set_title(
        f"{report['family']}: embeddings of {report['transitions']} transitions", loc="left"
    )
    axes.legend(frameon=False, fontsize=8)
    _save_figure(figure, path)


def check_suffix(path: Path) -> None:
    """Raise ``CheckpointError`` for a file that cannot be drawn to."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"cannot plot to {str(path)!r}: its name must end in one of {', '.join(SUFFIXES)}"
        )


def _new_figure(width_in: float) -> Figure:
    figure = Figure(figsize=(width_in, FIGURE_HEIGHT_IN), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_band(
    axes: Any, x: Sequence[float], bounds: Sequence[Sequence[float]], colour: str
) -> None:
    """Draw a band between lower and upper bounds, one pair for each ``x``."""
    low = [pair[0] for pair in bounds]
    high = [pair[1] for pair in bounds]
    axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _save_figure(figure: Figure, path: Path) -> None:
    check_suffix(path)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
