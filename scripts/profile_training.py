"""Profile one iteration of RL² on Warp: the kernels that take the time, and their bandwidth.

    profile_training.py FAMILY [--device cuda] [--out PATH] -- [settings of metarobot train ...]

The limit is the bandwidth of a large copy, measured here. What an operation moves is taken to be
its inputs, and its largest one again for what it writes: a lower bound.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from metarobot.learning.agent_interface import agents
from metarobot.training.config import TrainConfig
from metarobot.training.train import start_training

BYTES_PER_NUMBER = 4
COPIES = 5
KERNELS_SHOWN = 20
OPERATIONS_SHOWN = 2


class ProfileDone(Exception):  # noqa: N818
    """Raised to end the training once the profile is there."""


def bandwidth(device: str) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.zeros(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    times_s = []
    for _ in range(COPIES):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began)
    return 2 * BYTES_PER_NUMBER * len(source) / min(times_s)


def bytes_moved(shapes: Any) -> int:
    """Return the bytes that an operation on inputs of these shapes moves at least; 0 if unknown."""
    sizes = []
    for shape in shapes:
        if isinstance(shape, list | tuple) and shape and all(isinstance(n, int) for n in shape):
            sizes.append(math.prod(shape))
    if not sizes:
        return 0
    return BYTES_PER_NUMBER * (sum(sizes) + max(sizes))


def summarise_profile(profiled: Any, limit: float, device: str) -> dict[str, Any]:
    """Return the largest kernels, and the bandwidth of the largest operations of known shapes.

    On a GPU a kernel is an event of its own, Warp's too; on the CPU an operation is its own kernel.
    """

    def time_us(event: Any) -> float:
        if device == "cuda":
            return float(event.self_device_time_total)
        return float(event.self_cpu_time_total)

    device_type = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [event for event in profiled.key_averages() if event.device_type == device_type]
    events.sort(key=time_us, reverse=True)
    total_us = sum(time_us(event) for event in events)

    kernels = []
    for event in events[:KERNELS_SHOWN]:
        kernels.append(
            {
                "kernel": event.key,
                "calls": event.count,
                "ms": time_us(event) / 1e3,
                "share": time_us(event) / total_us,
            }
        )

    by_shape = sorted(profiled.key_averages(group_by_input_shape=True), key=time_us, reverse=True)
    known = [event for event in by_shape if bytes_moved(event.input_shapes) and time_us(event) > 0]
    operations = []
    for event in known[:OPERATIONS_SHOWN]:
        rate = bytes_moved(event.input_shapes) * event.count / (time_us(event) * 1e-6)
        operations.append(
            {
                "operation": event.key,
                "shapes": str(event.input_shapes),
                "gb_per_s": rate / 1e9,
                "of_limit": rate / limit,
            }
        )
    return {
        "limit_gb_per_s": limit / 1e9,
        "total_ms": total_us / 1e3,
        "kernels": kernels,
        "nearest": operations,
    }


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Read settings of RL² as ``metarobot train`` takes them; others are left out."""
    defaults = agents.get("rl2").config()
    types = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    settings = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        if name in types:
            settings[name] = types[name](float(value))
    return settings


def main() -> None:
    """Train for two iterations and profile the second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    own_words, _, training_words = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own_words.split())

    activities = [ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, record_shapes=True)
    iterations = 0

    def tick(_: object) -> None:
        nonlocal iterations
        iterations += 1
        if iterations == 1:  # the first builds kernels
            profiler.start()
        else:
            profiler.stop()
            raise ProfileDone

    config = agents.get("rl2").config(**parse_settings(training_words.split()))
    with tempfile.TemporaryDirectory() as folder:
        train_config = TrainConfig(
            family=options.family, steps=10**9, sim="warp", device=options.device
        )
        training = start_training(train_config, config, Path(folder) / "run")
        with contextlib.suppress(ProfileDone):
            training.train(show=False, tick=tick)

    report = summarise_profile(profiler, bandwidth(options.device), options.device)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["kernels"]:
        print(f"{row['share']:6.1%} {row['ms']:9.2f} ms {row['calls']:7} x {row['kernel'][:90]}")
    for row in report["nearest"]:
        print(f"{row['operation']}: {row['gb_per_s']:,.0f} GB/s, {row['of_limit']:.2f} of a copy's")


if __name__ == "__main__":
    main()
