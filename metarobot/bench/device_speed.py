"""Speed of environments that stay on a device against their physics alone, and memory against the
number of worlds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from metarobot.env.device import DeviceEnv, bytes_per_world, check_memory
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.optimiser_state import move_to_device
from metarobot.sim.protocol import WorldSelection
from metarobot.sim.warp import WarpSim, free_memory
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner


class _Told(NamedTuple):
    ctrl: Tensor
    over: Tensor


class _Tape:
    """A simulator that writes down what it is told: the drives' targets of each step, and who is
    put back after it.
    """

    def __init__(self, sim: WarpSim) -> None:
        self._sim, self.told = sim, list[_Told]()
        self._ctrl = sim.bind("ctrl")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sim, name)

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        self.told.append(_Told(self._ctrl.clone(), torch.zeros(0)))
        return self._sim.step(substeps, rows)

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        if isinstance(rows, Tensor):
            self.told[-1] = self.told[-1]._replace(over=rows)
        self._sim.reset(qpos, qvel, rows)


def bench_device(family: Family, *, worlds: int, seconds: float, device: str) -> dict[str, Any]:
    """Measure control steps a second of ``DeviceEnv.step``, and of its physics alone: the same
    steps and resets again.

    Every world has a task of its own. Rounds of one are an episode under random actions; rounds
    alternate.
    """
    if worlds < 1 or seconds <= 0:
        raise MetarobotError(f"worlds and seconds must be positive, not {worlds} and {seconds:g}")
    check_memory(family, worlds, device)
    env = DeviceEnv(family, family.space.sample("train", worlds), device=device)
    tape = _Tape(cast(WarpSim, env.sim))
    env.sim = tape
    generator = torch.Generator(env.device).manual_seed(0)
    shape = (family.horizon, worlds, env.act_dim)
    actions = torch.rand(shape, generator=generator, device=env.device) * 2 - 1
    rounds: dict[str, list[float]] = {"env": [], "engine": []}
    began = time.perf_counter()
    while len(rounds["env"]) < 3 or time.perf_counter() - began < seconds:
        tape.told.clear()
        rounds["env"].append(_timed(lambda: _live(env, actions), device))
        rounds["engine"].append(_timed(lambda: _replay(env, tape), device))
    lived = family.horizon * worlds
    env_s, engine_s = (
        statistics.median(rounds[k][1:]) for k in ("env", "engine")
    )  # the first builds kernels
    return {
        "family": family.name,
        "device": name(device),
        "worlds": worlds,
        "models": len({id(env.model(t)) for t in env.tasks}),
        "substeps": family.substeps,
        "rounds": len(rounds["env"]) - 1,
        "steps_per_s": lived / env_s,
        "engine_steps_per_s": lived / engine_s,
        "physics_steps_per_s": family.substeps * lived / engine_s,
        "ratio": engine_s / env_s,
        "lost": tape.lost(),
    }


def _live(env: DeviceEnv, actions: Tensor) -> None:
    env.reset(0)
    for action in actions:
        env.step(action)


def _replay(env: DeviceEnv, tape: _Tape) -> None:
    sim, (qpos, qvel) = tape._sim, env._rest
    ctrl = sim.bind("ctrl")
    sim.reset(qpos, qvel)
    for told in tape.told:
        ctrl.copy_(told.ctrl)
        sim.step(env.family.substeps)
        sim.reset(qpos, qvel, told.over)


def _timed(work: Callable[[], None], device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def name(device: str) -> str:
    """Name the device."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def bench_memory(family: Family, *, worlds: int, device: str) -> dict[str, Any]:
    """Measure the memory of twice as many worlds again and again, with an iteration of RL² in them,
    to the end of it.

    At most ``worlds``; what ends it before is said. On the CPU only the arrays of the physics are
    counted.
    """
    if worlds < 8:
        raise MetarobotError(f"worlds must be at least 8, not {worlds}")
    bytes_per_world(family, device)  # raises where nothing can run: that is no end of the memory
    rows: list[dict[str, float]] = []
    end = ""
    for n in _doubled(worlds):
        try:
            check_memory(family, n, device)
            rows.append(_iteration(family, n, device))
        except (MetarobotError, torch.OutOfMemoryError) as e:
            end = f"{n:,} worlds: {str(e).partition('. ')[0]}"
            break
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"family": family.name, "device": name(device), "rows": rows, "end": end}


def _doubled(most: int) -> Iterator[int]:
    n = min(most, 1024)
    while n <= most:
        yield n
        n *= 2


def _iteration(family: Family, worlds: int, device: str) -> dict[str, float]:
    """Live and learn from one trial in so many worlds; return the memory taken, GB."""
    before = free_memory(device)
    minibatches = 8
    config = agents.get("rl2").config(worlds=worlds, epochs=1, minibatches=minibatches)
    learner = build_learner("rl2", config, family, 0)
    move_to_device(learner, device)
    tasks = family.space.sample("train", worlds, 0)
    env = DeviceEnv(family, tasks, device=device)
    physics = cast(WarpSim, env.sim).bytes
    held = before - free_memory(device)
    trials = collect(learner.agent, env, tasks, episodes=config.episodes, seed=0)
    learner.update(trials, 0.0, 0)
    gb = {"physics": physics, "environment": held, "training": before - free_memory(device)}
    return {"worlds": worlds, **{f"{k}_gb": v / 1e9 for k, v in gb.items()}}
