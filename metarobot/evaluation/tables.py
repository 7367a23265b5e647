"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from metarobot.training.metrics_log import first_reach


def evaluation(report: dict[str, Any]) -> None:
    """Print an evaluation as a table."""
    rows = report["episodes"]
    title = f"{report['family']}, {report['tasks']} {report['split']} tasks, training seeds {report['seeds']}"
    if report["rollouts"] > 1:
        title += f", {report['rollouts']} rollouts an episode"
    table = Table(title=title, title_justify="left")
    extra = [k for k in ("blind", "oracle", "score") if k in rows[0]]
    for column in (
        "episodes seen",
        "mean",
        "95 % interval",
        "IQM",
        "worst 10 %",
        "gain",
        "95 % interval",
        *extra,
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        more = [f"{r[k]:.2f}" if k == "score" else f"{r[k]:.1f}" for k in extra]
        table.add_row(str(r["episode"]), *_cells(r), *more)
    for name, baseline in report.get("finetuning", {}).items():
        for r in baseline["episodes"]:
            table.add_row(f"{r['episode']}, {name}", *_cells(r), *[""] * len(extra), style="dim")
    for name, control in report.get("controls", {}).items():
        for r in control[1:]:
            table.add_row(f"{r['episode']}, {name}", *_cells(r), *[""] * len(extra), style="dim")
    Console(width=max(Console().width, 124)).print(table)
    if "worth" in rows[-1]:
        print(
            f"oracle over blind, task by task: {rows[-1]['worth']:+.1f} (95 %: {_interval(rows[-1]['worth_ci95'])})"
        )
    for name, rates in report.get("success", {}).items():
        said = " → ".join(f"{100 * r['mean']:.1f} %" for r in rates)
        low, high = (100 * x for x in rates[-1]["ci95"])
        print(
            f"success, {report['agent'] if name == 'agent' else name}: {said} (95 %: {low:.1f}…{high:.1f})"
        )
    for name, returns in report["kinds"].items():
        print(f"{name}: {' → '.join(f'{r:.1f}' for r in returns)}")
    if "beliefs" in report:
        _beliefs(report["beliefs"])


def _beliefs(report: Mapping[str, Any]) -> None:
    """Print how far beliefs about the task are off, and how often their central intervals hold the
    truth.
    """
    rows, names = report["episodes"], report["parameters"]
    last = rows[-1]
    table = Table(
        title="beliefs after 0, 1, … episodes, each training range mapped to [−1, 1]",
        title_justify="left",
    )
    inside = [f"{100 * float(level):g} % interval holds" for level in last["coverage"]]
    for column in ("parameter", "RMSE", "95 % interval", *inside):
        table.add_column(column, justify="right", no_wrap=True)
    for i, name in enumerate(names):
        low, high = last["rmse_ci95"][i]
        errors = " → ".join(f"{r['rmse'][i]:.2f}" for r in rows)
        table.add_row(
            name,
            errors,
            f"{low:.2f}…{high:.2f}",
            *(f"{100 * x[i]:.0f} %" for x in last["coverage"].values()),
        )
    every = [
        (100 * x, [100 * b for b in last["coverage_all_ci95"][k]])
        for k, x in last["coverage_all"].items()
    ]
    table.add_row("all", "", "", *(f"{x:.0f} % ({low:.0f}…{high:.0f})" for x, (low, high) in every))
    Console(width=max(Console().width, 124)).print(table)
    deviations = " → ".join(f"{r['deviation']:.3f}" for r in rows)
    low, high = last["deviation_ci95"]
    print(
        f"deviation of the posterior over latent tasks: {deviations} (95 %: {low:.3f}…{high:.3f})"
    )


def _cells(r: dict[str, Any]) -> tuple[str, ...]:
    gain = (f"{r['gain']:+.1f}", _interval(r["gain_ci95"])) if "gain" in r else ("", "")
    return f"{r['mean']:.1f}", _interval(r["ci95"]), f"{r['iqm']:.1f}", f"{r['worst10']:.1f}", *gain


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1f}…{bounds[1]:.1f}"


def shots(report: Mapping[str, Any]) -> None:
    """Print how few-shot imitation did."""
    table = Table(
        title=f"{report['family']}, {report['tasks']} {report['split']} tasks", title_justify="left"
    )
    for column in ("demonstrations", "success", "95 % interval", "of the reference"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [(f"{r['shots']} of each", r) for r in report["shots"]]
    rows += [(k, report[k]) for k in ("reference", "expert") if k in report]
    for name, r in rows:
        low, high = (100 * x for x in r["ci95"])
        share = f"{r['of_reference']:.2f}" if "of_reference" in r else ""
        table.add_row(name, f"{100 * r['mean']:.1f} %", f"{low:.1f}…{high:.1f}", share)
    Console(width=max(Console().width, 80)).print(table)
    print(f"by chance {100 * report['chance']:.0f} %")


def likeness(report: Mapping[str, Any], prototypes: bool) -> None:
    """Print what each task is most like, and how well tasks were told apart; the support set if
    asked.
    """
    if prototypes:
        _listing(report["prototypes"])
    title = f"{report['family']}, {report['tasks']} {report['split']} tasks by {report['transitions']} transitions"
    table = Table(title=title, title_justify="left")
    for column in ("task", "", "is most like, of the training tasks", "at"):
        table.add_column(column)
    for r in report["held_out"]:
        for i, n in enumerate(r["neighbours"]):
            mine = (_values(r["task"]), "new" if r["new"] else "known") if i == 0 else ("", "")
            table.add_row(
                *mine,
                _values(n["task"]),
                f"{n['distance']:.3f}",
                end_section=n is r["neighbours"][-1],
            )
    Console(width=max(Console().width, 124)).print(table)
    print(f"{len(report['prototypes'])} prototypes; known within {report['threshold']:.3f} of one")
    rates = (
        ("recognised among themselves", report["recognised"]),
        ("taken for new", report["new"]),
    )
    for name, r in rates:
        low, high = (100 * x for x in r["ci95"])
        print(
            f"{name}: {100 * r['mean']:.1f} % (95 %: {low:.1f}…{high:.1f}) of {report['queries']} episodes each"
        )
    print(f"by chance {100 * report['chance']:.1f} % would be recognised")
    ranks = report["rank_correlation"]
    print(
        "rank correlation of distances with those of the tasks: "
        f"prototypes {ranks['prototypes']:.3f}, these tasks to them {ranks['held_out']:.3f}"
    )


def _listing(prototypes: Sequence[Mapping[str, Any]]) -> None:
    """Print the support set."""
    table = Table(title="support set", title_justify="left")
    for column in ("prototype of", "transitions", "its windows lie within"):
        table.add_column(column)
    for p in prototypes:
        table.add_row(_values(p["task"]), str(p["transitions"]), f"{p['within']:.3f}")
    Console(width=max(Console().width, 124)).print(table)


def _values(task: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in task.items())


def maml(report: dict[str, Any]) -> None:
    """Print the times of MAML's parts as a table."""
    title = f"{report['family']}, {report['tasks']} tasks x {report['rollouts']} rollouts x {report['horizon']} steps"
    table = Table(title=f"{title}, seconds", title_justify="left")
    for column in (
        "tasks mapped by",
        "sampling",
        "inner step",
        "outer update",
        "total",
        "sampling against engine",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for how in ("vmap", "loop"):
        r = report[how]
        times = (f"{r[k]:.2f}" for k in ("sampling_s", "inner_step_s", "outer_update_s", "total_s"))
        table.add_row(
            how,
            *times,
            f"{r['sampling_steps_per_s']:,.0f} / {r['engine_steps_per_s']:,.0f} = {r['ratio']:.2f}",
        )
    Console(width=max(Console().width, 124)).print(table)
    print(f"peak memory {report['peak_memory_mb']:,.0f} MB; median of {report['rounds']} rounds")


def sim(report: Mapping[str, Any]) -> None:
    """Print what ``metarobot bench sim`` found."""
    print(
        f"{report['family']}, {report['worlds']} worlds: {report['steps_per_s']:,.0f} control steps/s; "
        f"bare engine {report['engine_steps_per_s']:,.0f}; ratio {report['ratio']:.3f}"
    )


def physics(report: Mapping[str, Any]) -> None:
    """Print what ``metarobot bench sim --sim warp`` found beside."""
    print(
        f"{report['physics_steps_per_s']:,.0f} physics steps/s, {report['models']:,} models, on {report['device']}"
    )
    print(f"lost contacts: {report['lost'] or 'none'}")


def memory(report: Mapping[str, Any]) -> None:
    """Print what ``metarobot bench memory`` found."""
    for row in report["rows"]:
        said = ", ".join(
            f"{k.removesuffix('_gb')} {v:.3f} GB" for k, v in row.items() if k != "worlds"
        )
        print(f"{report['family']}, {row['worlds']:,.0f} worlds: {said}")
    print(f"ended at {report['end']}" if report["end"] else "it did not end there")


def pearl(report: Mapping[str, Any]) -> None:
    """Print what ``metarobot bench pearl`` found."""
    print(
        f"{report['family']}, {report['threads']} threads: {report['gradient_steps_per_s']:,.1f} gradient steps/s, "
        f"{report['states_per_s']:,.0f} states/s; bare matrix products {report['products_per_s']:,.1f}; "
        f"ratio {report['ratio']:.2f}"
    )
    print(
        f"sampling, {report['worlds']} worlds: {report['sampling_steps_per_s']:,.0f} steps/s; "
        f"rl2 {report['rl2_sampling_steps_per_s']:,.0f}; ratio {report['sampling_ratio']:.2f}"
    )


def milestones(
    runs: Mapping[str, list[dict[str, Any]]], reach: Iterable[float], at: Iterable[float]
) -> None:
    """Print when each run first reached the returns ``reach``, and its return ``at`` so many
    seconds.
    """
    for name, rows in runs.items():
        for level in reach:
            row = first_reach(rows, level)
            when = (
                "never"
                if row is None
                else f"{row['time/time_elapsed']:.0f} s, {row['time/total_timesteps']:,} steps"
            )
            print(f"{name} reached {level:g}: {when}")
        for second in at:
            lived = [r for r in rows if r["time/time_elapsed"] <= second][-10:]
            if lived:
                mean = sum(r["meta/post_adapt_return"] for r in lived) / len(lived)
                steps = lived[-1]["time/total_timesteps"]
                print(
                    f"{name} after {second:g} s: {mean:.1f}, {steps:,} steps, {steps / second:,.0f} steps/s"
                )


def _compared(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a comparison, best first, oracles at the end."""
    agents = sorted(report["agents"].items(), key=lambda x: x[1].get("rank", len(report["agents"])))
    shown = len(agents[0][1]["episodes"])
    header = ["rank", "agent", *(f"after {k} episode{'' if k == 1 else 's'}" for k in range(shown))]
    scored = all("score" in entry["episodes"][-1] for _, entry in agents)
    header += ["worst 10 %", *(["score"] if scored else []), "steps", "wall time", "seeds"]
    rows = []
    for name, entry in agents:
        last = entry["episodes"][-1]
        notes = [f"{entry['rollouts']} rollouts"] if entry["rollouts"] > 1 else []
        notes += ["with noise"] if entry["explores"] else []
        cells = [str(entry.get("rank", "–")), name + (f" ({', '.join(notes)})" if notes else "")]
        cells += [f"{r['mean']:.1f} ({_interval(r['ci95'])})" for r in entry["episodes"]]
        cells += [f"{last['worst10']:.1f}", *([f"{last['score']:.2f}"] if scored else [])]
        steps, seconds = (sum(entry[k]) / len(entry[k]) for k in ("steps", "wall_s"))
        rows.append(
            [
                *cells,
                f"{steps / 1e6:.3g} M",
                f"{seconds:,.0f} s",
                ", ".join(map(str, entry["seeds"])),
            ]
        )
    return header, rows


def _compared_title(report: Mapping[str, Any]) -> str:
    return f"{report['family']}, {report['tasks']} {report['split']} tasks: mean return and its 95 % interval"


def comparison(report: Mapping[str, Any]) -> None:
    """Print a comparison as a table."""
    header, rows = _compared(report)
    table = Table(title=_compared_title(report), title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 1 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="dim" if row[0] == "–" else None)
    Console(
        width=max(
            Console().width, 100 + 24 * len(report["agents"][rows[0][1].split(" (")[0]]["episodes"])
        )
    ).print(table)


def comparison_markdown(report: Mapping[str, Any]) -> str:
    """Write a comparison as a table in Markdown."""
    header, rows = _compared(report)
    lines = [header, ["---:" if i != 1 else "---" for i in range(len(header))], *rows]
    return "\n".join(
        [_compared_title(report), "", *(f"| {' | '.join(line)} |" for line in lines), ""]
    )


def sampling(report: Mapping[str, Any]) -> None:
    """Print how fast agents live their trials."""
    title = f"{report['family']}: environment steps a second while collecting, median of {report['rounds']} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("agent", "worlds", "steps/s", "against rl2"):
        table.add_column(column, justify="left" if column == "agent" else "right", no_wrap=True)
    for name, r in sorted(report["agents"].items(), key=lambda x: -x[1]["ratio"]):
        table.add_row(name, str(r["worlds"]), f"{r['steps_per_s']:,.0f}", f"{r['ratio']:.2f}")
    Console(width=max(Console().width, 80)).print(table)
