"""A humanoid with a hidden direction, as published.

The task is that of PEARL (Rakelly et al. 2019) and VariBAD (Zintgraf et al. 2020), after MAML (Finn
et al. 2017). The robot is Gymnasium's ``humanoid.xml`` with a control step of 0.015 s and actions
rescaled to ±1, as in PEARL and VariBAD. The published cost of impacts is left out: with MuJoCo 2 it
was always zero (openai/gym issue 1541). The published observation also holds every body's inertia
and velocity and the forces on it, which no robot measures: here it has 45 numbers instead of 376.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from metarobot.envs.ant import (
    direction_reward,
    direction_space,
    observation_names,
    observe,
    outside_heights,
    readout_direction,
)
from metarobot.envs.robots.model_files import read_gymnasium_model
from metarobot.tasks.family import Display, Family, Interaction, WorldState
from metarobot.types import Floats

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_ACTION_LIMIT = 0.4
"""Largest command of the published motors; here an action of ±1 gives the same torque."""
JOINTS = (
    *(f"abdomen_{axis}" for axis in "zyx"),
    *(f"{side}_{j}" for side in ("right", "left") for j in ("hip_x", "hip_z", "hip_y", "knee")),
    *(f"{side}_{j}" for side in ("right", "left") for j in ("shoulder1", "shoulder2", "elbow")),
)


def humanoid_spec() -> mujoco.MjSpec:
    """Read the published model, rescale its actions to ±1, and sense its centre of mass."""
    spec = read_gymnasium_model("humanoid.xml")
    for motor in spec.actuators:
        motor.ctrlrange = [-1.0, 1.0]
        motor.gear[0] *= PUBLISHED_ACTION_LIMIT
    spec.add_sensor(
        name="centre",
        type=mujoco.mjtSensor.mjSENS_SUBTREECOM,
        objtype=mujoco.mjtObj.mjOBJ_BODY,
        objname="torso",
    )
    return spec


def centre_of_mass_velocity(before: WorldState, after: WorldState, dt: float) -> Tensor:
    """Return the centre of mass's mean velocity over a control step, m/s, ``(world, 2)``.

    Sensors are one substep late, so an episode's first step covers a substep less.
    """
    return (after.sensors - before.sensors)[:, :2] / dt


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Disturb the nominal pose as Gymnasium does: positions and velocities by ±0.01."""
    qpos = model.qpos0 + rng.uniform(-0.01, 0.01, model.nq)
    qvel = rng.uniform(-0.01, 0.01, model.nv)
    return qpos, qvel


humanoid_dir = Family(
    name="HumanoidDir",
    doc="Run in a direction, any of the circle, that only the reward reveals: "
    "horizon 200 (PEARL, VariBAD).",
    space=direction_space("HumanoidDir"),
    horizon=200,
    substeps=5,
    spec=humanoid_spec,
    observations=observation_names(JOINTS),
    observe=observe,
    reward=partial(direction_reward, velocity=centre_of_mass_velocity),
    weights={"speed": 1.25, "control": 0.1 * PUBLISHED_ACTION_LIMIT**2, "alive": 5.0},
    start=start,
    interaction=Interaction(terminate=partial(outside_heights, low=1.0, high=2.0)),
    display=Display(readout=readout_direction),
)
