"""Put what scripts/gpu_report.sh measured into one table.

    gpu_tables.py FOLDER

It writes FOLDER/report.md.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from metarobot.training.metrics_log import first_reach, read_metrics

RETURN_LEVELS = (-50.0, -40.0)
"""Returns of the cheetah whose time is reported."""
KERNELS_SHOWN = 8


def read_json(path: Path) -> Any:
    """Read JSON; empty if the file is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def speed_table(out: Path) -> list[str]:
    """Return the rates of physics and environments."""
    lines = [
        "| family | worlds | models | physics steps/s | control steps/s "
        "| environment over physics | lost |",
        "|---" * 7 + "|",
    ]
    for path in sorted(out.glob("bench-*.json")):
        row = read_json(path)
        lines.append(
            f"| {row['family']} | {row['worlds']:,} | {row['models']:,} "
            f"| {row['physics_steps_per_s']:,.0f} | {row['steps_per_s']:,.0f} "
            f"| {row['ratio']:.2f} | {row['lost'] or 'none'} |"
        )
    return lines


def training_table(out: Path) -> list[str]:
    """Return the speed of each run; its first iteration builds kernels and is left out."""
    lines = [
        "| run | steps/s | sampling | learning | s an iteration | last return |",
        "|---" * 6 + "|",
    ]
    for folder in sorted((out / "runs").iterdir()):
        rows = read_metrics(folder / "metrics.jsonl")
        rows = rows[1:] or rows
        if not rows:
            continue
        fps = statistics.median(row["time/fps"] for row in rows)
        collect_fps = statistics.median(row["time/collect_fps"] for row in rows)
        learn_fps = statistics.median(row["time/learn_fps"] for row in rows)
        elapsed_s = rows[-1]["time/time_elapsed"] - rows[0]["time/time_elapsed"]
        iteration_s = elapsed_s / max(len(rows) - 1, 1)
        lines.append(
            f"| {folder.name} | {fps:,.0f} | {collect_fps:,.0f} | {learn_fps:,.0f} "
            f"| {iteration_s:.2f} | {rows[-1]['meta/post_adapt_return']:.1f} |"
        )
    return lines


def milestone_lines(out: Path) -> list[str]:
    """Return the wall time to the returns that are claimed."""
    rows = read_metrics(out / "runs" / "cheetah" / "metrics.jsonl")
    lines = []
    for level in RETURN_LEVELS:
        row = first_reach(rows, level)
        when = "not reached"
        if row is not None:
            seconds = row["time/time_elapsed"]
            when = f"{seconds:.0f} s, {row['time/total_timesteps']:,.0f} steps"
        lines.append(f"- the cheetah to {level:g}: {when}")
    return lines


def repeatability_line(out: Path) -> str:
    """Return how far apart the learning curves of two runs of one seed are."""
    first = read_metrics(out / "runs" / "same-a" / "metrics.jsonl")
    second = read_metrics(out / "runs" / "same-b" / "metrics.jsonl")
    differences = []
    for a, b in zip(first, second, strict=False):
        differences.append(abs(a["meta/post_adapt_return"] - b["meta/post_adapt_return"]))
    text = ", ".join(f"{x:.3g}" for x in differences) or "nothing measured"
    return f"- the same seed twice: returns apart by {text}"


def memory_lines(out: Path) -> list[str]:
    """Return the memory of a training against the number of worlds."""
    lines = []
    for path in sorted(out.glob("memory-*.json")):
        report = read_json(path)
        points = [f"{row['worlds']:,.0f}: {row['training_gb']:.2f} GB" for row in report["rows"]]
        lines.append(
            f"- {report['family']}, memory of a training by worlds: {', '.join(points)}; "
            f"{report['end'] or 'no end met'}"
        )
    return lines


def profile_lines(out: Path) -> list[str]:
    """Return the largest kernels, and the bandwidth of the largest operations."""
    report = read_json(out / "profile.json")
    lines = []
    for row in report.get("kernels", [])[:KERNELS_SHOWN]:
        lines.append(f"- {row['share']:.1%} of the time: {row['kernel'][:80]}")
    for row in report.get("nearest", []):
        lines.append(f"- {row['operation']}: {row['of_limit']:.2f} of a copy's bandwidth")
    return lines


def failure_line(out: Path) -> str:
    """Return the pieces that failed."""
    failed = sorted(path.name for path in (out / "failed").iterdir())
    return f"- went wrong: {', '.join(failed) or 'nothing'}"


def main() -> None:
    """Write the report and print it."""
    out = Path(sys.argv[1])
    facts = [
        *milestone_lines(out),
        repeatability_line(out),
        *memory_lines(out),
        *profile_lines(out),
        failure_line(out),
    ]
    blocks = ["# Measured by scripts/gpu_report.sh"]
    for lines in (speed_table(out), training_table(out), facts):
        blocks.append("\n".join(lines))
    text = "\n\n".join(blocks) + "\n"
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
