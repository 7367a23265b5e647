"""Text tables of what the benches measured, as the terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from metarobot.evaluation.tables import SMALL_TABLE_WIDTH, WIDE_TABLE_WIDTH, render_table


def simulation_lines(report: Mapping[str, Any]) -> str:
    """Return what ``metarobot bench sim`` measured, on one line."""
    return (
        f"{report['family']}, {report['worlds']} worlds: "
        f"{report['steps_per_s']:,.0f} control steps/s; "
        f"bare engine {report['engine_steps_per_s']:,.0f}; ratio {report['ratio']:.3f}"
    )


def device_simulation_lines(report: Mapping[str, Any]) -> str:
    """Return what ``metarobot bench sim --sim warp`` measured."""
    return "\n".join(
        [
            simulation_lines(report),
            f"{report['physics_steps_per_s']:,.0f} physics steps/s, {report['models']:,} models, "
            f"on {report['device']}",
            f"lost contacts: {report['lost'] or 'none'}",
        ]
    )


def memory_lines(report: Mapping[str, Any]) -> str:
    """Return what ``metarobot bench memory`` measured, one line for each number of worlds."""
    lines = []
    for row in report["rows"]:
        shares = []
        for key, gigabytes in row.items():
            if key != "worlds":
                shares.append(f"{key.removesuffix('_gb')} {gigabytes:.3f} GB")
        lines.append(f"{report['family']}, {row['worlds']:,.0f} worlds: {', '.join(shares)}")
    if report["end"]:
        lines.append(f"ended at {report['end']}")
    else:
        lines.append("it did not end there")
    return "\n".join(lines)


def maml_table(report: Mapping[str, Any]) -> str:
    """Return the seconds of the parts of a MAML iteration, with ``vmap`` and with a loop."""
    sizes = (
        f"{report['family']}, {report['tasks']} tasks x {report['rollouts']} rollouts "
        f"x {report['horizon']} steps"
    )
    table = Table(title=f"{sizes}, seconds", title_justify="left")
    columns = (
        "tasks mapped by",
        "sampling",
        "inner step",
        "outer update",
        "total",
        "sampling against engine",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    for mapping in ("vmap", "loop"):
        row = report[mapping]
        table.add_row(
            mapping,
            f"{row['sampling_s']:.2f}",
            f"{row['inner_step_s']:.2f}",
            f"{row['outer_update_s']:.2f}",
            f"{row['total_s']:.2f}",
            f"{row['sampling_steps_per_s']:,.0f} / {row['engine_steps_per_s']:,.0f} "
            f"= {row['ratio']:.2f}",
        )

    memory = f"peak memory {report['peak_memory_mb']:,.0f} MB"
    return f"{render_table(table, WIDE_TABLE_WIDTH)}\n{memory}; median of {report['rounds']} rounds"


def pearl_lines(report: Mapping[str, Any]) -> str:
    """Return what ``metarobot bench pearl`` measured."""
    return "\n".join(
        [
            f"{report['family']}, {report['threads']} threads: "
            f"{report['gradient_steps_per_s']:,.1f} gradient steps/s, "
            f"{report['states_per_s']:,.0f} states/s; "
            f"bare matrix products {report['products_per_s']:,.1f}; ratio {report['ratio']:.2f}",
            f"sampling, {report['worlds']} worlds: "
            f"{report['sampling_steps_per_s']:,.0f} steps/s; "
            f"rl2 {report['rl2_sampling_steps_per_s']:,.0f}; "
            f"ratio {report['sampling_ratio']:.2f}",
        ]
    )


def collection_table(report: Mapping[str, Any]) -> str:
    """Return how fast each kind of agent collects its trials, the fastest first."""
    table = Table(
        title=(
            f"{report['family']}: environment steps a second while collecting, "
            f"median of {report['rounds']} rounds"
        ),
        title_justify="left",
    )
    for column in ("agent", "worlds", "steps/s", "against rl2"):
        table.add_column(column, justify="left" if column == "agent" else "right", no_wrap=True)

    fastest_first = sorted(report["agents"].items(), key=lambda item: -item[1]["ratio"])
    for name, row in fastest_first:
        table.add_row(name, str(row["worlds"]), f"{row['steps_per_s']:,.0f}", f"{row['ratio']:.2f}")
    return render_table(table, SMALL_TABLE_WIDTH)
