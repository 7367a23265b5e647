"""Text tables of reports, as the terminal shows them.

Every function takes a report's JSON data and returns text; printing is left to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from metarobot.training.metrics_log import first_reach

WIDE_TABLE_WIDTH = 124
"""Narrowest width at which wide tables are rendered, characters."""
SMALL_TABLE_WIDTH = 80
"""Narrowest width at which small tables are rendered, characters."""

MILESTONE_WINDOW = 10
"""Iterations that a return after so many seconds of training is averaged over."""


def render_table(table: Table, least_width: int) -> str:
    """Render a table to text, as wide as the terminal but not narrower than ``least_width``."""
    terminal_width = Console().width
    console = Console(width=max(terminal_width, least_width), force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def evaluation_table(report: Mapping[str, Any]) -> str:
    """Return an evaluation as a table: one row an episode, then baselines, success and beliefs."""
    rows = report["episodes"]
    references = [name for name in ("blind", "oracle", "score") if name in rows[0]]

    title = (
        f"{report['family']}, {report['tasks']} {report['split']} tasks, "
        f"training seeds {report['seeds']}"
    )
    if report["rollouts"] > 1:
        title += f", {report['rollouts']} rollouts an episode"

    table = Table(title=title, title_justify="left")
    columns = [
        "episodes seen",
        "mean",
        "95 % interval",
        "IQM",
        "worst 10 %",
        "gain",
        "95 % interval",
        *references,
    ]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    for row in rows:
        reference_cells = []
        for name in references:
            digits = 2 if name == "score" else 1
            reference_cells.append(f"{row[name]:.{digits}f}")
        table.add_row(str(row["episode"]), *_return_cells(row), *reference_cells)

    # Baselines and controls have no references of their own: those cells stay empty.
    empty = [""] * len(references)
    for name, baseline in report.get("finetuning", {}).items():
        for row in baseline["episodes"]:
            table.add_row(f"{row['episode']}, {name}", *_return_cells(row), *empty, style="dim")
    for name, control in report.get("controls", {}).items():
        # The first episode is played before the context is changed, and equals the agent's own.
        for row in control[1:]:
            table.add_row(f"{row['episode']}, {name}", *_return_cells(row), *empty, style="dim")

    parts = [render_table(table, WIDE_TABLE_WIDTH)]

    last = rows[-1]
    if "worth" in last:
        interval = _interval(last["worth_ci95"])
        parts.append(f"oracle over blind, task by task: {last['worth']:+.1f} (95 %: {interval})")

    for name, rates in report.get("success", {}).items():
        player = report["agent"] if name == "agent" else name
        percentages = " → ".join(f"{100 * rate['mean']:.1f} %" for rate in rates)
        low, high = rates[-1]["ci95"]
        parts.append(f"success, {player}: {percentages} (95 %: {100 * low:.1f}…{100 * high:.1f})")

    parts += _fault_lines(report["agent"], report.get("faults", {}))

    for name, returns in report["kinds"].items():
        means = " → ".join(f"{value:.1f}" for value in returns)
        parts.append(f"{name}: {means}")

    if "beliefs" in report:
        parts.append(_belief_table(report["beliefs"]))
    return "\n".join(parts)


def _fault_lines(agent: str, faults: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a line for each player that had faulted episodes: how many, episode by episode."""
    lines = []
    for name, counts in faults.items():
        if any(counts):
            player = agent if name == "agent" else name
            listed = " → ".join(str(count) for count in counts)
            lines.append(
                f"faulted episodes, {player}: {listed}; each counts as the worst return of all"
            )
    return lines


def _belief_table(beliefs: Mapping[str, Any]) -> str:
    """Return the errors of beliefs about the task, and the coverage of their central intervals."""
    rows = beliefs["episodes"]
    last = rows[-1]
    table = Table(
        title="beliefs after 0, 1, … episodes, each training range mapped to [−1, 1]",
        title_justify="left",
    )
    coverage_columns = [f"{100 * float(level):g} % interval holds" for level in last["coverage"]]
    for column in ("parameter", "RMSE", "95 % interval", *coverage_columns):
        table.add_column(column, justify="right", no_wrap=True)

    for i, name in enumerate(beliefs["parameters"]):
        errors = " → ".join(f"{row['rmse'][i]:.2f}" for row in rows)
        low, high = last["rmse_ci95"][i]
        coverage = [f"{100 * shares[i]:.0f} %" for shares in last["coverage"].values()]
        table.add_row(name, errors, f"{low:.2f}…{high:.2f}", *coverage)

    overall = []
    for level, share in last["coverage_all"].items():
        low, high = last["coverage_all_ci95"][level]
        overall.append(f"{100 * share:.0f} % ({100 * low:.0f}…{100 * high:.0f})")
    table.add_row("all", "", "", *overall)

    deviations = " → ".join(f"{row['deviation']:.3f}" for row in rows)
    low, high = last["deviation_ci95"]
    summary = (
        f"deviation of the posterior over latent tasks: {deviations} (95 %: {low:.3f}…{high:.3f})"
    )
    return f"{render_table(table, WIDE_TABLE_WIDTH)}\n{summary}"


def _return_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of one episode's statistics: mean, interval, IQM, worst tenth, gain."""
    gain = ""
    gain_interval = ""
    if "gain" in row:
        gain = f"{row['gain']:+.1f}"
        gain_interval = _interval(row["gain_ci95"])
    return (
        f"{row['mean']:.1f}",
        _interval(row["ci95"]),
        f"{row['iqm']:.1f}",
        f"{row['worst10']:.1f}",
        gain,
        gain_interval,
    )


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1f}…{bounds[1]:.1f}"


def few_shot_table(report: Mapping[str, Any]) -> str:
    """Return a few-shot imitation report as a table: one row for each number of demonstrations."""
    table = Table(
        title=f"{report['family']}, {report['tasks']} {report['split']} tasks",
        title_justify="left",
    )
    for column in ("demonstrations", "success", "95 % interval", "of the reference"):
        table.add_column(column, justify="right", no_wrap=True)

    rows = [(f"{row['shots']} of each", row) for row in report["shots"]]
    rows += [(name, report[name]) for name in ("reference", "expert") if name in report]
    for name, row in rows:
        low, high = row["ci95"]
        share = f"{row['of_reference']:.2f}" if "of_reference" in row else ""
        table.add_row(
            name,
            f"{100 * row['mean']:.1f} %",
            f"{100 * low:.1f}…{100 * high:.1f}",
            share,
        )
    parts = [render_table(table, SMALL_TABLE_WIDTH), f"by chance {100 * report['chance']:.0f} %"]
    for name, row in rows:
        if row.get("faults"):
            parts.append(f"faulted episodes, {name}: {row['faults']}; each counts as a failure")
    return "\n".join(parts)


def recognition_table(report: Mapping[str, Any], prototypes: bool = False) -> str:
    """Return the nearest training tasks of each held-out task, and the recognition rates.

    Args:
        report: What ``recognise`` returned.
        prototypes: Whether to list all prototypes of training tasks first.
    """
    parts = []
    if prototypes:
        parts.append(_prototype_table(report["prototypes"]))

    table = Table(
        title=(
            f"{report['family']}, {report['tasks']} {report['split']} tasks "
            f"by {report['transitions']} transitions"
        ),
        title_justify="left",
    )
    for column in ("task", "", "is most like, of the training tasks", "at"):
        table.add_column(column)
    for held_out in report["held_out"]:
        neighbours = held_out["neighbours"]
        for i, neighbour in enumerate(neighbours):
            # The task itself stands on the first of its neighbours' rows.
            task = _task_values(held_out["task"]) if i == 0 else ""
            verdict = ("unknown" if held_out["new"] else "known") if i == 0 else ""
            table.add_row(
                task,
                verdict,
                _task_values(neighbour["task"]),
                f"{neighbour['distance']:.3f}",
                end_section=i == len(neighbours) - 1,
            )
    parts.append(render_table(table, WIDE_TABLE_WIDTH))

    parts.append(
        f"{len(report['prototypes'])} prototypes; known within {report['threshold']:.3f} of one"
    )
    rates = {
        "recognised among themselves": report["recognised"],
        "judged unknown": report["new"],
    }
    for name, rate in rates.items():
        low, high = rate["ci95"]
        parts.append(
            f"{name}: {100 * rate['mean']:.1f} % (95 %: {100 * low:.1f}…{100 * high:.1f}) "
            f"of {report['queries']} episodes each"
        )
    if report.get("faults"):
        parts.append(f"faulted episodes: {report['faults']}, after these transitions")
    parts.append(f"by chance {100 * report['chance']:.1f} % would be recognised")

    ranks = report["rank_correlation"]
    parts.append(
        "rank correlation of distances with those of the tasks: "
        f"prototypes {ranks['prototypes']:.3f}, these tasks to them {ranks['held_out']:.3f}"
    )
    return "\n".join(parts)


def _prototype_table(prototypes: Sequence[Mapping[str, Any]]) -> str:
    """Return the support set: every prototype, and how close its windows lie to it."""
    table = Table(title="support set", title_justify="left")
    for column in ("prototype of", "transitions", "its windows lie within"):
        table.add_column(column)
    for prototype in prototypes:
        table.add_row(
            _task_values(prototype["task"]),
            str(prototype["transitions"]),
            f"{prototype['within']:.3f}",
        )
    return render_table(table, WIDE_TABLE_WIDTH)


def _task_values(task: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in task.items())


def milestone_lines(
    runs: Mapping[str, list[dict[str, Any]]], reach: Iterable[float], at: Iterable[float]
) -> str:
    """Return when each run first reached some returns, and its return after some times.

    Args:
        runs: Name -> rows of its ``metrics.jsonl``.
        reach: Returns of a trial's last episode.
        at: Seconds of training.
    """
    lines = []
    for name, rows in runs.items():
        for level in reach:
            row = first_reach(rows, level)
            when = "never"
            if row is not None:
                when = f"{row['time/time_elapsed']:.0f} s, {row['time/total_timesteps']:,} steps"
            lines.append(f"{name} reached {level:g}: {when}")

        for seconds in at:
            so_far = [row for row in rows if row["time/time_elapsed"] <= seconds]
            recent = so_far[-MILESTONE_WINDOW:]
            if not recent:
                continue
            mean = sum(row["meta/post_adapt_return"] for row in recent) / len(recent)
            steps = recent[-1]["time/total_timesteps"]
            lines.append(
                f"{name} after {seconds:g} s: {mean:.1f}, {steps:,} steps, "
                f"{steps / seconds:,.0f} steps/s"
            )
    return "\n".join(lines)


def comparison_table(report: Mapping[str, Any]) -> str:
    """Return a comparison as a table, best agent first and privileged agents last."""
    header, rows = _comparison_cells(report)
    table = Table(title=_comparison_title(report), title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 1 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="dim" if row[0] == "–" else None)

    episode_columns = sum(column.startswith("after ") for column in header)
    parts = [render_table(table, 100 + 24 * episode_columns), *_comparison_faults(report)]
    return "\n".join(parts)


def _comparison_faults(report: Mapping[str, Any]) -> list[str]:
    """Return a line for each compared agent that had faulted episodes."""
    return _fault_lines("", {name: e.get("faults", []) for name, e in report["agents"].items()})


def comparison_markdown(report: Mapping[str, Any]) -> str:
    """Return a comparison as a table in Markdown."""
    header, rows = _comparison_cells(report)
    alignment = ["---:"] * len(header)
    alignment[1] = "---"
    lines = [_comparison_title(report), ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows)]
    fault_lines = _comparison_faults(report)
    if fault_lines:
        lines += ["", *fault_lines]
    return "\n".join([*lines, ""])


def _comparison_title(report: Mapping[str, Any]) -> str:
    return (
        f"{report['family']}, {report['tasks']} {report['split']} tasks: "
        "mean return and its 95 % interval"
    )


def _comparison_cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison; privileged agents have no rank."""
    last_rank = len(report["agents"])
    agents = sorted(report["agents"].items(), key=lambda item: item[1].get("rank", last_rank))
    episodes = len(agents[0][1]["episodes"])
    scored = all("score" in entry["episodes"][-1] for _, entry in agents)

    header = ["rank", "agent"]
    header += [f"after {k} episode{'' if k == 1 else 's'}" for k in range(episodes)]
    header.append("worst 10 %")
    if scored:
        header.append("score")
    header += ["steps", "wall time", "seeds"]

    rows = []
    for name, entry in agents:
        notes = []
        if entry["rollouts"] > 1:
            notes.append(f"{entry['rollouts']} rollouts")
        if entry["explores"]:
            notes.append("with noise")

        cells = [str(entry.get("rank", "–"))]
        cells.append(f"{name} ({', '.join(notes)})" if notes else name)
        cells += [f"{row['mean']:.1f} ({_interval(row['ci95'])})" for row in entry["episodes"]]

        last = entry["episodes"][-1]
        cells.append(f"{last['worst10']:.1f}")
        if scored:
            cells.append(f"{last['score']:.2f}")

        # Training costs are averaged over the seeds.
        steps = sum(entry["steps"]) / len(entry["steps"])
        wall_s = sum(entry["wall_s"]) / len(entry["wall_s"])
        cells += [f"{steps / 1e6:.3g} M", f"{wall_s:,.0f} s"]
        cells.append(", ".join(str(seed) for seed in entry["seeds"]))
        rows.append(cells)
    return header, rows
