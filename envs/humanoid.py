"""A humanoid with a hidden direction, as published (Rakelly et al. 2019; Zintgraf et al. 2020;
after Finn et al. 2017).

The robot is Gymnasium's ``humanoid.xml``, 0.015 s a control step, with actions rescaled to ±1 as
PEARL and VariBAD do. The published cost of impacts is left out: with MuJoCo 2 it was always zero
(openai/gym issue 1541). The published observation also holds every body's inertia and velocity and
the forces on it, which no robot measures: here it is 45 numbers instead of 376.
"""

from __future__ import annotations

from functools import partial

import mujoco
import numpy as np
from torch import Tensor

from metarobot.envs.ant import (
    direction,
    fallen,
    follow_direction,
    names,
    observe,
    published,
    readout,
)
from metarobot.tasks.family import Display, Family, Interaction, WorldState
from metarobot.types import Floats

REACH = 0.4
"""The largest command of the published motors: an action of ±1."""
JOINTS = (
    *(f"abdomen_{a}" for a in "zyx"),
    *(f"{side}_{j}" for side in ("right", "left") for j in ("hip_x", "hip_z", "hip_y", "knee")),
    *(f"{side}_{j}" for side in ("right", "left") for j in ("shoulder1", "shoulder2", "elbow")),
)


def humanoid() -> mujoco.MjSpec:
    """Read the published model, rescale its commands to the same torques, and sense its centre of
    mass.
    """
    spec = published("humanoid.xml")
    for motor in spec.actuators:
        motor.ctrlrange = [-1.0, 1.0]
        motor.gear[0] *= REACH
    sensor = {
        "type": mujoco.mjtSensor.mjSENS_SUBTREECOM,
        "objtype": mujoco.mjtObj.mjOBJ_BODY,
        "objname": "torso",
    }
    spec.add_sensor(name="centre", **sensor)
    return spec


def centre_velocity(before: WorldState, after: WorldState, dt: float) -> Tensor:
    """Mean velocity of the centre of mass over a control step, m/s, ``(world, 2)``, one substep
    late.

    An episode's first step holds a substep less.
    """
    return (after.sensors - before.sensors)[:, :2] / dt


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Disturb the nominal pose as Gymnasium does: uniform ±0.01 in position and velocity."""
    return model.qpos0 + rng.uniform(-0.01, 0.01, model.nq), rng.uniform(-0.01, 0.01, model.nv)


humanoid_dir = Family(
    name="HumanoidDir",
    doc="Run in a direction, any of the circle, that only the reward reveals: horizon 200 (PEARL, VariBAD).",
    space=direction("HumanoidDir"),
    horizon=200,
    substeps=5,
    spec=humanoid,
    observations=names(JOINTS),
    observe=observe,
    reward=partial(follow_direction, velocity=centre_velocity),
    weights={"speed": 1.25, "control": 0.1 * REACH**2, "alive": 5.0},
    start=start,
    interaction=Interaction(
        terminate=partial(fallen, low=1.0, high=2.0),
    ),
    display=Display(
        readout=readout,
    ),
)
