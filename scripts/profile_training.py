"""Profile one iteration of RL² on Warp: which kernels take the time, and how near the device's
limit the largest are.

``profile_training.py FAMILY [--device cuda] [--out PATH] -- [settings of metarobot train ...]``.
The limit is the bandwidth of a large copy, measured here. What an operation moves is taken to be
its inputs, and its largest one again for what it writes: a lower bound.
"""

import argparse
import contextlib
import json
import math
import operator
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from metarobot.learning.agent_interface import agents
from metarobot.training.config import TrainConfig
from metarobot.training.train import start_run, train

NUMBERS = 4
"""Bytes of a number."""


def bandwidth(device: str) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    a = torch.zeros(2**28 if device == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        b.copy_(a)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return 2 * NUMBERS * len(a) / min(took)


def moved(shapes: Any) -> int:
    """Return the bytes that an operation on inputs of these shapes moves at least; 0 if it is not
    known."""
    sizes = [
        math.prod(s)
        for s in shapes
        if isinstance(s, list | tuple) and s and all(isinstance(n, int) for n in s)
    ]
    return NUMBERS * (sum(sizes) + max(sizes)) if sizes else 0


def summary(profiled: Any, limit: float, device: str) -> dict[str, Any]:
    """Return the largest kernels, and the bandwidth of the two largest operations whose shapes are
    known.

    On a GPU a kernel is an event of its own, Warp's too; on the CPU an operation is its own kernel.
    """

    def spent(event: Any) -> float:
        return float(
            event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        )

    place = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = sorted(
        (e for e in profiled.key_averages() if e.device_type == place), key=spent, reverse=True
    )
    total = sum(map(spent, events))
    top = [
        {"kernel": e.key, "calls": e.count, "ms": spent(e) / 1e3, "share": spent(e) / total}
        for e in events[:20]
    ]
    shaped = sorted(profiled.key_averages(group_by_input_shape=True), key=spent, reverse=True)
    near = []
    for e in [e for e in shaped if moved(e.input_shapes) and spent(e) > 0][:2]:
        rate = moved(e.input_shapes) * e.count / (spent(e) * 1e-6)
        near.append(
            {
                "operation": e.key,
                "shapes": str(e.input_shapes),
                "gb_per_s": rate / 1e9,
                "of_limit": rate / limit,
            }
        )
    return {"limit_gb_per_s": limit / 1e9, "total_ms": total / 1e3, "kernels": top, "nearest": near}


def settings(words: list[str]) -> dict[str, Any]:
    """Read settings of RL² as ``metarobot train`` takes them."""
    usual, read = agents.get("rl2").config(), {}
    for name, word in zip(words[::2], words[1::2], strict=True):
        key = name.removeprefix("--").replace("-", "_")
        if hasattr(usual, key):
            read[key] = type(getattr(usual, key))(float(word))
    return read


def main() -> None:
    """Train for two iterations and profile the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    told = parser.parse_args(own.split())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if told.device == "cuda" else [])]
    config = agents.get("rl2").config(**settings(rest.split()))
    with tempfile.TemporaryDirectory() as folder:
        where = TrainConfig(family=told.family, steps=10**9, sim="warp", device=told.device)
        run = start_run(where, config, Path(folder) / "run")
        watched = profile(activities=activities, record_shapes=True)
        todo = iter((watched.start, watched.stop))

        def tick(_: object) -> None:
            next(todo)()
            if operator.length_hint(todo) == 0:
                raise StopIteration

        with contextlib.suppress(StopIteration):  # after the second iteration
            train(run, show=False, tick=tick)
    report = summary(watched, bandwidth(told.device), told.device)
    told.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["kernels"]:
        print(f"{row['share']:6.1%} {row['ms']:9.2f} ms {row['calls']:7} x {row['kernel'][:90]}")
    for row in report["nearest"]:
        print(f"{row['operation']}: {row['gb_per_s']:,.0f} GB/s, {row['of_limit']:.2f} of a copy's")


if __name__ == "__main__":
    main()
