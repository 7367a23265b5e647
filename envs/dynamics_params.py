"""A walker and a hopper of unknown masses, inertias, damping and friction, as published.

The tasks are those of PEARL (Rakelly et al. 2019) and VariBAD (Zintgraf et al. 2020), which share
``rand_param_envs``: every mass and inertia and the friction of every geom is multiplied by
1.5^U[−3, 3], the damping of every joint by 1.3^U[−3, 3]; run forward whatever they are. The robots
are Gymnasium's ``walker2d_v5.xml`` and ``hopper.xml`` with a control step of 0.008 s. Those of
``rand_param_envs`` differ in two things: their control steps are twice as long, 0.016 s in VariBAD,
and only one of the walker's feet has a friction of 1.9.

Published factors that change nothing are left out. A planar robot turns about y alone, so a body
has one factor on its inertia, not three. Its contacts neither twist nor roll, which leaves sliding
friction. And before an episode ends nothing but feet touches the floor, where the larger of the two
frictions counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from metarobot.envs.cheetah import control_cost, forward_speed, readout
from metarobot.envs.robots.model_files import make_inertias_explicit, read_gymnasium_model
from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import LogUniform, Mixture
from metarobot.tasks.family import Display, Family, Interaction, WorldState
from metarobot.tasks.model_edits import Edit
from metarobot.tasks.space import Param, TaskSpace
from metarobot.types import Floats

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

HOPPER_LIMBS = ("thigh", "leg", "foot")
WALKER_LIMBS = (*HOPPER_LIMBS, *(f"{limb}_left" for limb in HOPPER_LIMBS))


def planar_robot_spec(file: str) -> mujoco.MjSpec:
    """Read a published model and make its masses and inertias explicit."""
    spec = read_gymnasium_model(file)
    make_inertias_explicit(spec)
    return spec


def scale_factor(
    name: str, base: float, element: str, target: str, field: str, *index: int | None
) -> Param:
    """Return a parameter that scales components of a field by base^U[−3, 3].

    The factor extrapolates to base^±4.
    """
    smaller = LogUniform(base**-4, base**-3)
    larger = LogUniform(base**3, base**4)
    return Param(
        name=name,
        train=LogUniform(base**-3, base**3),
        extrapolation=Mixture((0.5, 0.5), (smaller, larger)),
        edits=tuple(
            Edit(element=element, name=target, field=field, index=i, op="scale") for i in index
        ),
        doc="times the nominal value",
    )


def dynamics_space(name: str, limbs: Sequence[str]) -> TaskSpace:
    """Vary masses, inertias, damping and friction of a torso with these limbs independently."""
    bodies = ("torso", *limbs)
    feet = [limb for limb in limbs if limb.startswith("foot")]
    # 1.5 and 1.3 are the bases of rand_param_envs
    masses = [scale_factor(f"{b}_mass", 1.5, "body", b, "mass", None) for b in bodies]
    inertias = [scale_factor(f"{b}_inertia", 1.5, "body", b, "inertia", 0, 1, 2) for b in bodies]
    dampings = [
        scale_factor(f"{limb}_joint_damping", 1.3, "joint", f"{limb}_joint", "damping", 0)
        for limb in limbs
    ]
    # the larger of floor's and foot's friction counts, so both vary
    frictions = [
        scale_factor("floor_friction", 1.5, "geom", "floor", "friction", 0),
        *(
            scale_factor(f"{foot}_friction", 1.5, "geom", f"{foot}_geom", "friction", 0)
            for foot in feet
        ),
    ]
    return TaskSpace(name, (*masses, *inertias, *dampings, *frictions))


def observation_names(limbs: Sequence[str]) -> tuple[str, ...]:
    """Return the names of what ``observe`` returns."""
    coordinates = [("height", "m"), ("pitch", "rad"), *((limb, "rad") for limb in limbs)]
    positions = (f"{name}_{unit}" for name, unit in coordinates)
    velocities = (f"{name}_{unit}/s" for name, unit in coordinates)
    return (*positions, "x_m/s", *velocities)


def observe(state: WorldState) -> Tensor:
    """Return positions without x, then velocities clipped to ±10.

    Shape ``(world, 17)`` for the walker and ``(world, 11)`` for the hopper.
    """
    return torch.cat([state.qpos[:, 1:], state.qvel.clamp(-10, 10)], 1).float()


def run_reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return the forward speed, −‖a‖², and 1 for being alive.

    The last term is paid at an episode's last step too, as published.
    """
    speed = forward_speed(before, after, dt)
    return {
        "speed": speed,
        "control": -control_cost(after.action),
        "alive": torch.ones_like(speed),
    }


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Disturb the nominal pose as Gymnasium does: positions and velocities by ±0.005."""
    qpos = model.qpos0 + rng.uniform(-0.005, 0.005, model.nq)
    qvel = rng.uniform(-0.005, 0.005, model.nv)
    return qpos, qvel


def fallen(
    state: WorldState, low: float, high: float, max_pitch: float, max_speed: float = math.inf
) -> Tensor:
    """Return where the robot has fallen or moves impossibly fast, ``(world,)``.

    Args:
        state: All worlds.
        low: Lowest height of the torso, m.
        high: Highest height of the torso, m.
        max_pitch: Largest pitch of the torso either way, rad.
        max_speed: Largest value of any velocity, m/s or rad/s.
    """
    height = state.qpos[:, 1]
    pitch = state.qpos[:, 2].abs()
    too_fast = state.qvel.abs().amax(1) >= max_speed
    return (height <= low) | (height >= high) | (pitch >= max_pitch) | too_fast


walker_params = Family(
    name="WalkerParams",
    doc="Run on two legs of unknown masses, inertias, damping and friction: "
    "horizon 200 (PEARL, VariBAD).",
    space=dynamics_space("WalkerParams", WALKER_LIMBS),
    horizon=200,
    substeps=4,
    spec=partial(planar_robot_spec, "walker2d_v5.xml"),
    observations=observation_names(WALKER_LIMBS),
    observe=observe,
    reward=run_reward,
    weights={"speed": 1.0, "control": 1e-3, "alive": 1.0},
    start=start,
    interaction=Interaction(terminate=partial(fallen, low=0.8, high=2.0, max_pitch=1.0)),
    display=Display(readout=readout),
)

hopper_params = walker_params.replace(
    name="HopperParams",
    doc="Hop on one leg of unknown masses, inertias, damping and friction: "
    "horizon 200 (PEARL, VariBAD).",
    space=dynamics_space("HopperParams", HOPPER_LIMBS),
    spec=partial(planar_robot_spec, "hopper.xml"),
    observations=observation_names(HOPPER_LIMBS),
    terminate=partial(fallen, low=0.7, high=math.inf, max_pitch=0.2, max_speed=100.0),
)
