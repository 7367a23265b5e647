"""Speed of environments on the device, against its bare physics; and how many worlds fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from metarobot.device import DeviceEnv, measure
from metarobot.family import Family
from metarobot.progress import bar
from metarobot.types import MetarobotError

DIFFERENT = 2048
"""Tasks drawn, and so at most different models; worlds beyond share them."""


def bench_device(family: Family, *, worlds: int, seconds: float, device: str) -> dict[str, Any]:
    """Measure control steps with observation, reward and resets against the bare physics, in turn."""
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")
    drawn = family.space.sample("train", min(worlds, DIFFERENT), 0)
    env = DeviceEnv(family, [drawn[i % len(drawn)] for i in range(worlds)], device=device, room=measure(family))
    draw = torch.rand(8, worlds, env.act_dim, generator=torch.Generator(device).manual_seed(0), device=device)
    actions = env.action_low + (env.action_high - env.action_low) * draw
    rounds: dict[str, list[float]] = {"env": [], "physics": []}
    steps = 8 if device == "cpu" else family.horizon
    with bar() as progress:
        task = progress.add_task("measuring", total=seconds)
        began = time.perf_counter()
        while len(rounds["env"]) < 3 or time.perf_counter() - began < seconds:
            env.restart(len(rounds["env"]))
            rounds["env"].append(_rate(lambda k: env.step(actions[k % 8]), steps, worlds, device))
            env.restart(len(rounds["env"]))
            rounds["physics"].append(_rate(lambda _: env.sim.step(family.substeps), steps, worlds, device))
            progress.update(task, completed=time.perf_counter() - began)
    env_rate, bare = (sorted(rounds[k][1:])[len(rounds[k]) // 2 - 1] for k in ("env", "physics"))
    ratios = sorted(e / b for e, b in zip(rounds["env"][1:], rounds["physics"][1:], strict=True))
    return {
        "family": family.name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "worlds": worlds,
        "models": len({id(env.model(t)) for t in env.tasks}),
        "steps_per_s": env_rate,
        "engine_steps_per_s": bare,
        "physics_steps_per_s": bare * family.substeps,
        "ratio": ratios[len(ratios) // 2],
        "memory_mb": memory_mb(),
        "lost": getattr(env.sim, "lost")(),  # noqa: B009
    }


def most_worlds(family: Family, *, device: str, first: int = 1024, most: int = 1 << 20) -> list[dict[str, Any]]:
    """Double the number of worlds until the device's memory ends; return the memory that each number takes."""
    found, room = [], measure(family)
    while first <= most:
        drawn = family.space.sample("train", min(first, DIFFERENT), 0)
        try:
            env = DeviceEnv(family, [drawn[i % len(drawn)] for i in range(first)], device=device, room=room)
        except MetarobotError as e:
            return [*found, {"worlds": first, "error": str(e)}]
        env.step(torch.zeros(first, env.act_dim, device=device))
        found.append({"worlds": first, "memory_mb": memory_mb()})
        del env
        first *= 2
    return found


def memory_mb() -> float:
    """Return the GPU memory in use by everybody, MB; zero without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def _rate(drive: Callable[[int], Any], steps: int, worlds: int, device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    for k in range(steps):
        drive(k)
    _wait(device)
    return steps * worlds / (time.perf_counter() - began)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
