"""An ant with a hidden direction or a hidden goal, as published (Rakelly et al. 2019, after Finn et
al. 2017).

The robot is Gymnasium's ``ant.xml``, unchanged: 0.05 s a control step. ProMP (Rothfuss et al.
2019), PEARL and VariBAD (Zintgraf et al. 2020) share these rewards, but for a cost of contact
forces that is left out here, as are those forces where they are observed: with MuJoCo 2 all were
zero (openai/gym issue 1541), and the cost is at most 0.04 a step.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import gymnasium
import mujoco
import torch
from torch import Tensor

from metarobot.envs.cheetah import effort, start
from metarobot.tasks.distributions import Uniform
from metarobot.tasks.family import Display, Family, Interaction, WorldState
from metarobot.tasks.space import Param, TaskSpace

Velocity = Callable[[WorldState, WorldState, float], Tensor]
RADIUS = 3.0
"""Of the disc that goals lie on, m."""
JOINTS = tuple(f"{j}_{i}" for i in range(1, 5) for j in ("hip", "ankle"))


def names(joints: Sequence[str]) -> tuple[str, ...]:
    """Name what ``observe`` returns of a robot that floats freely."""
    body = ("height_m", *(f"quaternion_{a}" for a in "wxyz"), *(f"{j}_rad" for j in joints))
    motion = (*(f"{a}_m/s" for a in ("x", "y", "height")), *(f"turn_{a}_rad/s" for a in "xyz"))
    return (*body, *motion, *(f"{j}_rad/s" for j in joints))


def published(file: str) -> mujoco.MjSpec:
    """Read one of Gymnasium's models."""
    assets = pathlib.Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    return mujoco.MjSpec.from_file(str(assets / file))


def observe(state: WorldState) -> Tensor:
    """Positions without x and y, then velocities, ``(world, 27)`` for the ant."""
    return torch.cat([state.qpos[:, 2:], state.qvel], 1).float()


def observe_place(state: WorldState) -> Tensor:
    """All positions, as published, then velocities, ``(world, 29)``: who seeks a place must know
    where it stands.
    """
    return torch.cat([state.qpos, state.qvel], 1).float()


def velocity(before: WorldState, after: WorldState, dt: float) -> Tensor:
    """Mean velocity of the torso over the control step, m/s, ``(world, 2)``."""
    return (after.qpos[:, :2] - before.qpos[:, :2]) / dt


def onward(v: Tensor, state: WorldState) -> Tensor:
    """Speed in the hidden direction, m/s, ``(world,)``."""
    angle = state.task["direction"]
    return angle.cos() * v[:, 0] + angle.sin() * v[:, 1]


def follow_direction(
    before: WorldState, after: WorldState, dt: float, velocity: Velocity = velocity
) -> dict[str, Tensor]:
    """Speed in the direction, −‖a‖², and 1 for being alive, at an episode's last step too."""
    speed = onward(velocity(before, after, dt), after)
    return {"speed": speed, "control": -effort(after.action), "alive": torch.ones_like(speed)}


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the torso's speed in the hidden direction."""
    return {"onward m/s": onward(velocity(before, after, dt), after)}


def fallen(state: WorldState, low: float, high: float) -> Tensor:
    """Say where the torso is not between two heights, m."""
    return (state.qpos[:, 2] < low) | (state.qpos[:, 2] > high)


def to_goal(state: WorldState) -> Tensor:
    """From the torso to the goal, m, ``(world, 2)``."""
    angle, radius = state.task["goal_angle"], RADIUS * state.task["goal_area"].sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1) - state.qpos[:, :2]


def reach(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """−|x| − |y| to the goal, and −‖a‖²."""
    return {"distance": -to_goal(after).abs().sum(1), "control": -effort(after.action)}


def readout_goal(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the distance to the goal."""
    return {"to goal m": to_goal(after).norm(dim=1)}


def direction(name: str) -> TaskSpace:
    """All directions of the plane; the circle has nothing beyond."""
    angle = Uniform(-math.pi, math.pi)
    return TaskSpace(
        name,
        (
            Param(
                name="direction",
                train=angle,
                unit="rad",
                doc="rewarded; 0 is along x, left positive",
            ),
        ),
    )


GOALS = TaskSpace(
    "AntGoal",
    (
        Param(
            name="goal_angle",
            train=Uniform(-math.pi, math.pi),
            unit="rad",
            doc="seen from the start, left positive",
        ),
        # Not the distance is drawn but how much of the disc is nearer: every square metre is as
        # likely, as published.
        Param(
            name="goal_area",
            train=Uniform(0, 1),
            extrapolation=Uniform(1, (4 / 3) ** 2),
            doc=f"the goal's distance is {RADIUS:g} m times its root",
        ),
    ),
)

ant_dir = Family(
    name="AntDir",
    doc="Walk in a direction, any of the circle, that only the reward reveals: horizon 200 (ProMP, PEARL).",
    space=direction("AntDir"),
    horizon=200,
    substeps=5,
    spec=partial(published, "ant.xml"),
    observations=names(JOINTS),
    observe=observe,
    reward=follow_direction,
    weights={"speed": 1.0, "control": 0.5, "alive": 1.0},
    start=start,
    interaction=Interaction(
        terminate=partial(fallen, low=0.2, high=1.0),
    ),
    display=Display(
        readout=readout,
    ),
)

ant_goal = ant_dir.replace(
    name="AntGoal",
    doc="Find a goal within 3 m that only the reward reveals, and stay: horizon 200 (ProMP, PEARL).",
    space=GOALS,
    observations=("x_m", "y_m", *ant_dir.observations),
    observe=observe_place,
    reward=reach,
    weights={"distance": 1.0, "control": 0.1},
    terminate=None,
    readout=readout_goal,
)
