"""HalfCheetah on unknown ground, under an unknown load, with motors that are weak, dead or wired
the wrong way round.

Nothing of the task is observed: floor friction, slope, payload and the strength of each motor have
to be felt. The published robot with its masses made explicit (so that a payload adds to them) and a
box on its back.
"""

from __future__ import annotations

from dataclasses import replace

import mujoco
from torch import Tensor

from metarobot.envs.cheetah import JOINTS, cheetah, cheetah_vel, effort, speed
from metarobot.tasks.distributions import Choice, LogUniform, Mixture, Uniform
from metarobot.tasks.family import WorldState
from metarobot.tasks.mujoco_models import Edit, compile_spec
from metarobot.tasks.space import Param, TaskSpace


def loaded_cheetah() -> mujoco.MjSpec:
    """Build the published cheetah with explicit masses and a welded payload box, 1 kg in the
    nominal model.
    """
    spec = cheetah()
    nominal = compile_spec(spec)
    spec.compiler.settotalmass = -1.0
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_AUTO
    for body in spec.bodies[1:]:
        row = nominal.body(body.name)
        body.explicitinertial = True
        body.mass, body.ipos, body.iquat, body.inertia = (
            float(row.mass[0]),
            row.ipos,
            row.iquat,
            row.inertia,
        )
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


def run(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Forward speed and −‖a‖²."""
    return {"speed": speed(before, after, dt), "control": -effort(after.action)}


def motor(name: str) -> Param:
    """Build the strength of one motor, a factor on its torque: healthy, reversed or dead."""
    return Param(
        name=f"{name}_motor",
        train=Mixture((0.7, 0.25, 0.05), (Uniform(0.8, 1.2), Uniform(-1.2, -0.8), Choice((0.0,)))),
        extrapolation=Mixture((0.5, 0.5), (Uniform(0.5, 0.8), Uniform(-0.8, -0.5))),
        edits=(Edit(element="actuator", name=name, field="gear", index=0, op="scale"),),
        doc="torque factor; negative is reversed, 0 is dead",
    )


SPACE = TaskSpace(
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
        *(motor(name) for name in JOINTS),
    ),
)

cheetah_terrain = replace(
    cheetah_vel,
    name="CheetahTerrain",
    doc="Run on unknown ground, under an unknown load, with weak, dead or reversed motors: horizon 200.",
    space=SPACE,
    spec=loaded_cheetah,
    reward=run,
)
