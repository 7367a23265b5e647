"""A walker and a hopper of unknown masses, inertias, damping and friction (Rakelly et al. 2019;
Zintgraf et al. 2020).

As in ``rand_param_envs``, which PEARL and VariBAD share: every mass and inertia and the friction of
every geom times 1.5^U[−3, 3], the damping of every joint times 1.3^U[−3, 3]; run forward whatever
they are. The robots are Gymnasium's ``walker2d_v5.xml`` and ``hopper.xml``, at 0.008 s a control
step. Those of ``rand_param_envs`` differ in two things: their control steps are twice as long,
0.016 s in VariBAD, and only one of the walker's feet has a friction of 1.9.

Published factors that change nothing are left out. A planar robot turns about y alone, so a body
has one factor on its inertia, not three. Its contacts neither twist nor roll, which leaves sliding
friction. And before an episode ends nothing but feet reaches the floor; the larger friction of
floor and foot counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.envs.ant import published
from metarobot.envs.cheetah import effort, readout, speed
from metarobot.tasks.distributions import LogUniform, Mixture
from metarobot.tasks.family import Display, Family, Interaction, WorldState
from metarobot.tasks.mujoco_models import Edit, compile_spec
from metarobot.tasks.space import Param, TaskSpace
from metarobot.types import Floats

LEG = ("thigh", "leg", "foot")
LEGS = (*LEG, *(f"{part}_left" for part in LEG))


def explicit(file: str) -> mujoco.MjSpec:
    """Read a published model and write down the masses and inertias that follow from its geoms, to
    scale each alone.
    """
    spec = published(file)
    nominal = compile_spec(spec)
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
    return spec


def factor(
    name: str, base: float, element: str, target: str, field: str, *index: int | None
) -> Param:
    """Build a factor of base^U[−3, 3] on components of a field, and of up to base^±4 to
    extrapolate.
    """
    outer = (LogUniform(base**-4, base**-3), LogUniform(base**3, base**4))
    return Param(
        name=name,
        train=LogUniform(base**-3, base**3),
        extrapolation=Mixture((0.5, 0.5), outer),
        edits=tuple(
            Edit(element=element, name=target, field=field, index=i, op="scale") for i in index
        ),
        doc="times the nominal value",
    )


def factors(name: str, limbs: Sequence[str]) -> TaskSpace:
    """Vary masses, inertias, damping and friction of a torso on these limbs, each by itself."""
    bodies, feet = ("torso", *limbs), [x for x in limbs if x.startswith("foot")]
    return TaskSpace(
        name,
        (
            *(factor(f"{b}_mass", 1.5, "body", b, "mass", None) for b in bodies),
            *(factor(f"{b}_inertia", 1.5, "body", b, "inertia", 0, 1, 2) for b in bodies),
            *(
                factor(f"{x}_joint_damping", 1.3, "joint", f"{x}_joint", "damping", 0)
                for x in limbs
            ),
            factor("floor_friction", 1.5, "geom", "floor", "friction", 0),
            *(factor(f"{x}_friction", 1.5, "geom", f"{x}_geom", "friction", 0) for x in feet),
        ),
    )


def names(limbs: Sequence[str]) -> tuple[str, ...]:
    """Name what ``observe`` returns."""
    parts = [("height", "m"), ("pitch", "rad"), *((x, "rad") for x in limbs)]
    return (*(f"{n}_{u}" for n, u in parts), "x_m/s", *(f"{n}_{u}/s" for n, u in parts))


def observe(state: WorldState) -> Tensor:
    """Positions without x, then velocities up to ±10, ``(world, 17)`` for the walker and 11 for the
    hopper.
    """
    return torch.cat([state.qpos[:, 1:], state.qvel.clamp(-10, 10)], 1).float()


def run(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Forward speed, −‖a‖², and 1 for being alive, at an episode's last step too."""
    forward = speed(before, after, dt)
    return {"speed": forward, "control": -effort(after.action), "alive": torch.ones_like(forward)}


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Disturb the nominal pose as Gymnasium does: uniform ±0.005 in position and velocity."""
    return model.qpos0 + rng.uniform(-0.005, 0.005, model.nq), rng.uniform(-0.005, 0.005, model.nv)


def fallen(
    state: WorldState, low: float, high: float, lean: float, fast: float = math.inf
) -> Tensor:
    """Say where the torso is not between two heights, m, or leans too far, rad, or any velocity is
    too large.
    """
    height, pitch = state.qpos[:, 1], state.qpos[:, 2].abs()
    return (height <= low) | (height >= high) | (pitch >= lean) | (state.qvel.abs().amax(1) >= fast)


walker_params = Family(
    name="WalkerParams",
    doc="Run on two legs of unknown masses, inertias, damping and friction: horizon 200 (PEARL, VariBAD).",
    space=factors("WalkerParams", LEGS),
    horizon=200,
    substeps=4,
    spec=partial(explicit, "walker2d_v5.xml"),
    observations=names(LEGS),
    observe=observe,
    reward=run,
    weights={"speed": 1.0, "control": 1e-3, "alive": 1.0},
    start=start,
    interaction=Interaction(
        terminate=partial(fallen, low=0.8, high=2.0, lean=1.0),
    ),
    display=Display(
        readout=readout,
    ),
)

hopper_params = walker_params.replace(
    name="HopperParams",
    doc="Hop on one leg of unknown masses, inertias, damping and friction: horizon 200 (PEARL, VariBAD).",
    space=factors("HopperParams", LEG),
    spec=partial(explicit, "hopper.xml"),
    observations=names(LEG),
    terminate=partial(fallen, low=0.7, high=math.inf, lean=0.2, fast=100.0),
)
