"""Speed of environments that stay on a device, against their physics alone."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from metarobot.bench.harness import (
    Round,
    check_sizes,
    device_name,
    measure_rounds,
    median,
    timed,
)
from metarobot.env.device import DeviceEnv, check_memory
from metarobot.sim.simulator import WorldSelection
from metarobot.sim.warp import WarpSim
from metarobot.tasks.family import Family


class DeviceStep(NamedTuple):
    """One control step as the simulator was asked for it."""

    ctrl: Tensor
    """Targets of the actuators, ``(world, actuator)``."""
    parked: tuple[Tensor, Tensor, Tensor] | None
    """State and mask of the worlds that were put back to a start before the step."""


class RecordingWarpSim:
    """A Warp simulator that records its control steps, so that they can be repeated."""

    def __init__(self, sim: WarpSim) -> None:
        self.sim = sim
        self.start: tuple[Tensor, Tensor] | None = None
        """State that all worlds were reset to last: qpos and qvel."""
        self.steps: list[DeviceStep] = []
        self._ctrl = sim.bind("ctrl")
        self._parked: tuple[Tensor, Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sim, name)

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Record the start of an episode in all worlds, and reset."""
        if rows is None:
            self.start = (qpos, qvel)
            self.steps.clear()
        self.sim.reset(qpos, qvel, rows)

    def park(self, qpos: Tensor, qvel: Tensor, mask: Tensor) -> None:
        """Record which worlds wait, and put them into a state in which they may."""
        self._parked = (qpos, qvel, mask)
        self.sim.park(qpos, qvel, mask)

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Record the targets of a control step, and take it."""
        self.steps.append(DeviceStep(self._ctrl.clone(), self._parked))
        self._parked = None
        return self.sim.step(substeps, rows)

    def repeat(self, substeps: int) -> None:
        """Repeat the recorded episode with nothing but the physics."""
        assert self.start is not None
        self.sim.reset(*self.start)
        for step in self.steps:
            self._ctrl.copy_(step.ctrl)
            if step.parked is not None:
                self.sim.park(*step.parked)
            self.sim.step(substeps)


def bench_device(
    family: Family, *, worlds: int, seconds: float, device: str, show: bool = True
) -> dict[str, Any]:
    """Measure control steps a second of ``DeviceEnv``, and of the same steps of physics alone.

    Every world has a task of its own. A round is an episode under random actions, then the same
    physics again.

    Args:
        family: What is simulated.
        worlds: Number of worlds.
        seconds: How long to measure, at least.
        device: Warp's device, ``cpu`` or ``cuda``.
        show: Whether to show a progress bar.

    Raises:
        MetarobotError: No worlds, no time, or a family that Warp cannot run here.
    """
    check_sizes(worlds, seconds)
    check_memory(family, worlds, device)
    env = DeviceEnv(family, family.space.sample("train", worlds), device=device)
    sim = RecordingWarpSim(cast(WarpSim, env.sim))
    env.sim = sim

    generator = torch.Generator(env.device).manual_seed(0)
    shape = (family.horizon, worlds, env.act_dim)
    actions = torch.rand(shape, generator=generator, device=env.device) * 2 - 1

    def run_env() -> None:
        env.reset(0)
        for action in actions:
            env.step(action)

    def measure() -> Round:
        _, env_s = timed(run_env, device)
        _, physics_s = timed(lambda: sim.repeat(family.substeps), device)
        return {"env": env_s, "physics": physics_s}

    rounds = measure_rounds(measure, seconds, show=show)  # the warm-up builds kernels

    steps = family.horizon * worlds
    env_s = median(rounds, "env")
    physics_s = median(rounds, "physics")
    return {
        "family": family.name,
        "device": device_name(device),
        "worlds": worlds,
        "models": len({id(env.model(task)) for task in env.tasks}),
        "substeps": family.substeps,
        "rounds": len(rounds),
        "steps_per_s": steps / env_s,
        "engine_steps_per_s": steps / physics_s,
        "physics_steps_per_s": family.substeps * steps / physics_s,
        "ratio": physics_s / env_s,
        "lost": sim.overflows(),
    }
