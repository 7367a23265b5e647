"""Latency of a policy's step on one thread, and whether many steps leave memory behind.

python scripts/latency.py policy/ --json latency.json

Steps are timed one by one, back to back, and then paced as on a robot (--hz), which finds caches
cold; the host's share is told by an empty loop timed in the same way.
"""

import argparse
import gc
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.progress import track

from metarobot.bridge.policy.onnx_policy import OnnxPolicy


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def timed(step: Callable[[int], Any], count: int, period_s: float = 0.0) -> dict[str, float]:
    """Call ``step`` so many times, at a fixed rate if there is a period; return quantiles of its
    time, µs."""
    took = np.empty(count)
    due = time.perf_counter()
    for i in track(range(count), description="steps"):
        if period_s:
            due = max(due + period_s, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
        begun = time.perf_counter_ns()
        step(i)
        took[i] = time.perf_counter_ns() - begun
    quantiles = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}
    return {k: round(float(np.percentile(took, q)) / 1e3, 2) for k, q in quantiles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", type=Path)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument(
        "--ticks", type=int, default=1_000_000, help="steps over which memory is watched"
    )
    parser.add_argument("--hz", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long steps are paced")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy = OnnxPolicy.load(options.policy)
    obs = (
        np.random.default_rng(0)
        .normal(size=(1024, len(policy.meta.observation_names)))
        .astype(np.float32)
    )
    act = lambda i: policy.act(obs[i & 1023], 0.1, False)  # noqa: E731
    for i in range(1000):
        act(i)
    gc.freeze()
    report: dict[str, Any] = {
        "agent": f"{policy.meta.family}, {policy.meta.agent}",
        "onnxruntime": onnxruntime.__version__,
        "load": round(os.getloadavg()[0], 2),
        "back_to_back_us": timed(act, options.steps),
        "nothing_us": timed(lambda i: None, options.steps),
        "paced_us": timed(act, int(options.hz * options.seconds), 1 / options.hz),
    }
    before = resident_mb()
    for i in range(options.ticks):
        act(i)
    report["resident_mb"] = {
        "before": round(before, 2),
        "after": round(resident_mb(), 2),
        "ticks": options.ticks,
    }
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
