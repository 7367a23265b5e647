"""HalfCheetah on unknown ground, under an unknown load, with unknown motors.

Floor friction, slope, payload and the strength of each motor, which may be weak, dead or reversed,
are hidden: none is observed, all have to be inferred from the motion. The robot is the published
one with its masses made explicit, so that a payload adds to them, and a box on its back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import mujoco

from metarobot.envs.cheetah import (
    JOINTS,
    cheetah_spec,
    cheetah_vel,
    control_cost,
    forward_speed,
)
from metarobot.envs.robots.model_files import make_inertias_explicit
from metarobot.tasks.distributions import Choice, LogUniform, Mixture, Uniform
from metarobot.tasks.family import WorldState
from metarobot.tasks.model_edits import Edit
from metarobot.tasks.space import Param, TaskSpace

if TYPE_CHECKING:
    from torch import Tensor


def loaded_cheetah_spec() -> mujoco.MjSpec:
    """Build the published cheetah with a box on its back, 1 kg in the nominal model."""
    spec = cheetah_spec()
    make_inertias_explicit(spec)
    # the published model scales all masses to 14 kg; with a payload the sum must be free
    spec.compiler.settotalmass = -1.0

    box = spec.body("torso").add_body(name="payload", pos=[0, 0, 0.12])
    box.add_geom(
        name="payload",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[0.18, 0.1, 0.06],
        mass=1.0,
        contype=0,
        conaffinity=0,
        rgba=[0.25, 0.35, 0.55, 1],
    )
    return spec


def forward_reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return the forward speed and −‖a‖²."""
    return {
        "speed": forward_speed(before, after, dt),
        "control": -control_cost(after.action),
    }


def motor_strength(name: str) -> Param:
    """Return the parameter of one motor, a factor on its torque: healthy, reversed or dead."""
    healthy = Uniform(0.8, 1.2)
    reversed_ = Uniform(-1.2, -0.8)
    dead = Choice((0.0,))
    return Param(
        name=f"{name}_motor",
        train=Mixture((0.7, 0.25, 0.05), (healthy, reversed_, dead)),
        extrapolation=Mixture((0.5, 0.5), (Uniform(0.5, 0.8), Uniform(-0.8, -0.5))),
        edits=(Edit(element="actuator", name=name, field="gear", index=0, op="scale"),),
        doc="torque factor; negative is reversed, 0 is dead",
    )


TERRAIN_SPACE = TaskSpace(
    "CheetahTerrain",
    (
        Param(
            name="friction",
            train=LogUniform(0.4, 1.2),
            extrapolation=LogUniform(0.2, 0.4),
            edits=(Edit(element="geom", name="floor", field="friction", index=0),),
            doc="sliding friction of the floor",
        ),
        Param(
            name="slope",
            train=Uniform(-5, 5),
            held_out=(1.0, 2.0),
            extrapolation=Uniform(5, 10),
            edits=(Edit(element="option", field="gravity", op="rotate_y"),),
            unit="deg",
            doc="positive is uphill; x and height are along and across the slope",
        ),
        Param(
            name="payload",
            train=Uniform(0.1, 4),
            extrapolation=Uniform(4, 7),
            edits=(Edit(element="geom", name="payload", field="mass"),),
            unit="kg",
            doc="on the back of the 14 kg robot",
        ),
        *(motor_strength(name) for name in JOINTS),
    ),
)

cheetah_terrain = replace(
    cheetah_vel,
    name="CheetahTerrain",
    doc="Run on unknown ground, under an unknown load, with weak, dead or reversed motors: "
    "horizon 200.",
    space=TERRAIN_SPACE,
    spec=loaded_cheetah_spec,
    reward=forward_reward,
)
