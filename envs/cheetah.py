"""HalfCheetah with a hidden target speed or direction, as published (Finn et al. 2017; Rakelly et
al. 2019).

The robot is Gymnasium's ``half_cheetah.xml``, unchanged: 0.05 s a control step, observation of 17
numbers (no x).
"""

from __future__ import annotations

import pathlib
from dataclasses import replace

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.tasks.distributions import Choice, Uniform
from metarobot.tasks.family import Display, Family, WorldState
from metarobot.tasks.space import Param, TaskSpace
from metarobot.types import Floats

JOINTS = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")
OBSERVATIONS = (
    "height_m",
    "pitch_rad",
    *(f"{j}_rad" for j in JOINTS),
    "x_m/s",
    "height_m/s",
    "pitch_rad/s",
    *(f"{j}_rad/s" for j in JOINTS),
)


def cheetah() -> mujoco.MjSpec:
    """Read the published model."""
    assets = pathlib.Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    return mujoco.MjSpec.from_file(str(assets / "half_cheetah.xml"))


def observe(state: WorldState) -> Tensor:
    """Positions without x, then velocities, ``(world, 17)``."""
    return torch.cat([state.qpos[:, 1:], state.qvel], 1).float()


def speed(before: WorldState, after: WorldState, dt: float) -> Tensor:
    """Mean forward speed over the control step, m/s, ``(world,)``."""
    return (after.qpos[:, 0] - before.qpos[:, 0]) / dt


def effort(action: Tensor) -> Tensor:
    """Squared norm of the action, ``(world,)``."""
    return action.square().sum(1)


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Disturb the nominal pose as Gymnasium does: uniform ±0.1 in position, normal 0.1 in
    velocity.
    """
    return model.qpos0 + rng.uniform(-0.1, 0.1, model.nq), 0.1 * rng.standard_normal(model.nv)


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the speed."""
    return {"speed m/s": speed(before, after, dt)}


def track_speed(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """−|v − target| and −‖a‖²."""
    return {
        "speed": -(speed(before, after, dt) - after.task["target_speed"]).abs(),
        "control": -effort(after.action),
    }


def follow_direction(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Direction times speed, and −‖a‖²."""
    return {
        "speed": speed(before, after, dt) * after.task["direction"],
        "control": -effort(after.action),
    }


def target_speed(name: str, high: float) -> TaskSpace:
    """Target speeds from standing still to ``high``, and up to a third beyond to extrapolate."""
    beyond = Uniform(high, high * 4 / 3)
    return TaskSpace(
        name,
        (
            Param(
                name="target_speed",
                train=Uniform(0, high),
                extrapolation=beyond,
                unit="m/s",
                doc="rewarded speed",
            ),
        ),
    )


cheetah_vel = Family(
    name="CheetahVel",
    doc="Run at a speed that only the reward reveals: U[0, 3] m/s, horizon 200 (PEARL, VariBAD).",
    space=target_speed("CheetahVel", 3.0),
    horizon=200,
    substeps=5,
    spec=cheetah,
    observations=OBSERVATIONS,
    observe=observe,
    reward=track_speed,
    weights={"speed": 1.0, "control": 0.05},
    start=start,
    display=Display(
        readout=readout,
    ),
)

cheetah_vel_100 = replace(
    cheetah_vel,
    name="CheetahVel100",
    doc="MAML's version of CheetahVel: U[0, 2] m/s, horizon 100.",
    space=target_speed("CheetahVel100", 2.0),
    horizon=100,
)

cheetah_dir = replace(
    cheetah_vel,
    name="CheetahDir",
    doc="Run forward or backward; only the reward reveals which: horizon 200 (PEARL).",
    space=TaskSpace(
        "CheetahDir",
        (Param(name="direction", train=Choice((1.0, -1.0)), doc="+1 forward, −1 backward"),),
    ),
    reward=follow_direction,
)

cheetah_dir_100 = replace(
    cheetah_dir,
    name="CheetahDir100",
    doc="MAML's and ProMP's version of CheetahDir: horizon 100.",
    space=replace(cheetah_dir.space, name="CheetahDir100"),
    horizon=100,
)
