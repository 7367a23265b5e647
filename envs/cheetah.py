"""HalfCheetah with a hidden target speed or direction, as published.

The tasks are those of MAML (Finn et al. 2017) and PEARL (Rakelly et al. 2019). The robot is
Gymnasium's ``half_cheetah.xml``, unchanged: a control step takes 0.05 s, and the observation has 17
numbers (no x).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from metarobot.envs.robots.model_files import read_gymnasium_model
from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import Choice, Uniform
from metarobot.tasks.family import Display, Family, WorldState
from metarobot.tasks.space import Param, TaskSpace
from metarobot.types import Floats

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

JOINTS = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")
"""Names of the joints and motors: b(ack) and f(ront)."""
OBSERVATIONS = (
    "height_m",
    "pitch_rad",
    *(f"{joint}_rad" for joint in JOINTS),
    "x_m/s",
    "height_m/s",
    "pitch_rad/s",
    *(f"{joint}_rad/s" for joint in JOINTS),
)
"""Names of the elements of the observation."""

cheetah_spec = partial(read_gymnasium_model, "half_cheetah.xml")
"""Reads the published model."""


def observe(state: WorldState) -> Tensor:
    """Return positions without x, then velocities, ``(world, 17)``."""
    return torch.cat([state.qpos[:, 1:], state.qvel], 1).float()


def forward_speed(before: WorldState, after: WorldState, dt: float) -> Tensor:
    """Return the mean forward speed over the control step, m/s, ``(world,)``."""
    return (after.qpos[:, 0] - before.qpos[:, 0]) / dt


def control_cost(action: Tensor) -> Tensor:
    """Return the squared norm of the action, ``(world,)``."""
    return action.square().sum(1)


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Disturb the nominal pose as Gymnasium does: positions by ±0.1, velocities normally by 0.1."""
    qpos = model.qpos0 + rng.uniform(-0.1, 0.1, model.nq)
    qvel = 0.1 * rng.standard_normal(model.nv)
    return qpos, qvel


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the forward speed."""
    return {"speed m/s": forward_speed(before, after, dt)}


def target_speed_reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return −|v − target| and −‖a‖²."""
    error = forward_speed(before, after, dt) - after.task["target_speed"]
    return {"speed": -error.abs(), "control": -control_cost(after.action)}


def direction_reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return the speed in the hidden direction, and −‖a‖²."""
    speed = forward_speed(before, after, dt) * after.task["direction"]
    return {"speed": speed, "control": -control_cost(after.action)}


def target_speed_space(name: str, high: float) -> TaskSpace:
    """Vary the target speed from zero to ``high``, m/s; extrapolate up to a third beyond."""
    target_speed = Param(
        name="target_speed",
        train=Uniform(0, high),
        extrapolation=Uniform(high, high * 4 / 3),
        unit="m/s",
        doc="rewarded speed",
    )
    return TaskSpace(name, (target_speed,))


def direction_space(name: str) -> TaskSpace:
    """Vary the direction, forward or backward."""
    direction = Param(name="direction", train=Choice((1.0, -1.0)), doc="+1 forward, −1 backward")
    return TaskSpace(name, (direction,))


cheetah_vel = Family(
    name="CheetahVel",
    doc="Run at a speed that only the reward reveals: U[0, 3] m/s, horizon 200 (PEARL, VariBAD).",
    space=target_speed_space("CheetahVel", 3.0),
    horizon=200,
    substeps=5,
    spec=cheetah_spec,
    observations=OBSERVATIONS,
    observe=observe,
    reward=target_speed_reward,
    weights={"speed": 1.0, "control": 0.05},
    start=start,
    display=Display(readout=readout),
)

cheetah_vel_100 = replace(
    cheetah_vel,
    name="CheetahVel100",
    doc="MAML's version of CheetahVel: U[0, 2] m/s, horizon 100.",
    space=target_speed_space("CheetahVel100", 2.0),
    horizon=100,
)

cheetah_dir = replace(
    cheetah_vel,
    name="CheetahDir",
    doc="Run forward or backward; only the reward reveals which: horizon 200 (PEARL).",
    space=direction_space("CheetahDir"),
    reward=direction_reward,
)

cheetah_dir_100 = replace(
    cheetah_dir,
    name="CheetahDir100",
    doc="MAML's and ProMP's version of CheetahDir: horizon 100.",
    space=direction_space("CheetahDir100"),
    horizon=100,
)
