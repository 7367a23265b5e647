"""Latency of a policy's step on one thread, and whether many steps leave memory behind.

    python scripts/latency.py policy/ --json latency.json

Steps are timed back to back, and then paced as on a robot (--hz), where they find caches cold. An
empty function timed in the same way shows the host's share.
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

WARM_UP_STEPS = 1000
QUANTILES = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}
"""Name in the report -> percentile."""
OBSERVATIONS = 1024
"""Number of random observations, used in turn; a power of two."""


def resident_mb() -> float:
    """Return the resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def step_times_us(
    step: Callable[[int], Any], count: int, period_s: float = 0.0
) -> dict[str, float]:
    """Call ``step`` ``count`` times; return quantiles of its duration, µs.

    ``period_s`` is the interval between calls; 0: back to back.
    """
    durations_ns = np.empty(count)
    due = time.perf_counter()
    for i in track(range(count), description="steps"):
        if period_s:
            due = max(due + period_s, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
        started_ns = time.perf_counter_ns()
        step(i)
        durations_ns[i] = time.perf_counter_ns() - started_ns
    return {
        name: round(float(np.percentile(durations_ns, percentile)) / 1e3, 2)
        for name, percentile in QUANTILES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", type=Path, help="policy folder")
    parser.add_argument("--steps", type=int, default=100_000, help="steps back to back")
    parser.add_argument(
        "--ticks", type=int, default=1_000_000, help="steps over which memory is watched"
    )
    parser.add_argument("--hz", type=float, default=500.0, help="rate of the paced steps")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the paced steps")
    parser.add_argument("--json", type=Path, help="report to write")
    options = parser.parse_args()

    policy = OnnxPolicy.load(options.policy)
    rng = np.random.default_rng(0)
    obs_dim = len(policy.meta.observation_names)
    obs = rng.normal(size=(OBSERVATIONS, obs_dim)).astype(np.float32)

    def act(i: int) -> Any:
        return policy.act(obs[i & (OBSERVATIONS - 1)], 0.1, False)

    for i in range(WARM_UP_STEPS):
        act(i)
    gc.freeze()
    report: dict[str, Any] = {
        "agent": f"{policy.meta.family}, {policy.meta.agent}",
        "onnxruntime": onnxruntime.__version__,
        "load": round(os.getloadavg()[0], 2),
        "back_to_back_us": step_times_us(act, options.steps),
        "nothing_us": step_times_us(lambda i: None, options.steps),
        "paced_us": step_times_us(act, int(options.hz * options.seconds), 1 / options.hz),
    }

    before_mb = resident_mb()
    for i in range(options.ticks):
        act(i)
    report["resident_mb"] = {
        "before": round(before_mb, 2),
        "after": round(resident_mb(), 2),
        "ticks": options.ticks,
    }

    text = json.dumps(report, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
