"""Put what scripts/gpu_report.sh measured into one table: ``gpu_tables.py FOLDER`` writes
FOLDER/report.md."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from metarobot.training.metrics_log import first_reach, read_metrics

LEVELS = (-50.0, -40.0)


def read(path: Path) -> Any:
    """Read JSON, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def benches(out: Path) -> list[str]:
    """Rates of physics and environments."""
    lines = [
        "| family | worlds | models | physics steps/s | control steps/s | environment over physics | lost |",
        "|---" * 7 + "|",
    ]
    for path in sorted(out.glob("bench-*.json")):
        r = read(path)
        lines.append(
            f"| {r['family']} | {r['worlds']:,} | {r['models']:,} | {r['physics_steps_per_s']:,.0f} "
            f"| {r['steps_per_s']:,.0f} | {r['ratio']:.2f} | {r['lost'] or 'none'} |"
        )
    return lines


def trainings(out: Path) -> list[str]:
    """Speed of sampling and learning together, of each run; the first iteration builds kernels and
    is left out."""
    lines = [
        "| run | steps/s | sampling | learning | s an iteration | last return |",
        "|---" * 6 + "|",
    ]
    for folder in sorted((out / "runs").iterdir()):
        rows = read_metrics(folder / "metrics.jsonl")
        rows = rows[1:] or rows
        if not rows:
            continue
        fps, collect, learn = (
            statistics.median(r[f"time/{k}"] for r in rows)
            for k in ("fps", "collect_fps", "learn_fps")
        )
        span = (rows[-1]["time/time_elapsed"] - rows[0]["time/time_elapsed"]) / max(
            len(rows) - 1, 1
        )
        lines.append(
            f"| {folder.name} | {fps:,.0f} | {collect:,.0f} | {learn:,.0f} | {span:.2f} "
            f"| {rows[-1]['meta/post_adapt_return']:.1f} |"
        )
    return lines


def reached(out: Path) -> list[str]:
    """Wall time to the returns that are claimed."""
    rows, lines = read_metrics(out / "runs" / "cheetah" / "metrics.jsonl"), []
    for level in LEVELS:
        row = first_reach(rows, level)
        said = (
            "not reached"
            if row is None
            else f"{row['time/time_elapsed']:.0f} s, {row['time/total_timesteps']:,.0f} steps"
        )
        lines.append(f"- the cheetah to {level:g}: {said}")
    return lines


def same(out: Path) -> list[str]:
    """How far apart the curves of one seed are."""
    a, b = (read_metrics(out / "runs" / f"same-{k}" / "metrics.jsonl") for k in "ab")
    apart = [
        abs(x["meta/post_adapt_return"] - y["meta/post_adapt_return"])
        for x, y in zip(a, b, strict=False)
    ]
    return [
        f"- the same seed twice: returns apart by {', '.join(f'{d:.3g}' for d in apart) or 'nothing measured'}"
    ]


def rest(out: Path) -> list[str]:
    """Memory against worlds, and the profile."""
    lines = []
    for path in sorted(out.glob("memory-*.json")):
        r = read(path)
        each = ", ".join(f"{row['worlds']:,.0f}: {row['training_gb']:.2f} GB" for row in r["rows"])
        lines.append(
            f"- {r['family']}, memory of a training by worlds: {each}; {r['end'] or 'no end met'}"
        )
    profile = read(out / "profile.json")
    lines += [
        f"- {k['share']:.1%} of the time: {k['kernel'][:80]}"
        for k in profile.get("kernels", [])[:8]
    ]
    lines += [
        f"- {n['operation']}: {n['of_limit']:.2f} of a copy's bandwidth"
        for n in profile.get("nearest", [])
    ]
    failed = sorted(p.name for p in (out / "failed").iterdir())
    return [*lines, f"- went wrong: {', '.join(failed) or 'nothing'}"]


def main() -> None:
    """Write the report and print it."""
    out = Path(sys.argv[1])
    parts = (benches(out), trainings(out), [*reached(out), *same(out), *rest(out)])
    text = (
        "# Measured by scripts/gpu_report.sh\n\n"
        + "\n\n".join("\n".join(lines) for lines in parts)
        + "\n"
    )
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
