"""An ant with a hidden direction or a hidden goal, as published.

The tasks are those of PEARL (Rakelly et al. 2019), after MAML (Finn et al. 2017). The robot is
Gymnasium's ``ant.xml``, unchanged: a control step takes 0.05 s. ProMP (Rothfuss et al. 2019), PEARL
and VariBAD (Zintgraf et al. 2020) share these rewards, except for a cost of contact forces that is
left out here, as are those forces in the observation: with MuJoCo 2 all of them were zero
(openai/gym issue 1541), and the cost is at most 0.04 a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from metarobot.envs.cheetah import control_cost, start
from metarobot.envs.robots.model_files import read_gymnasium_model
from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import Uniform
from metarobot.tasks.family import Display, Family, Interaction, WorldState
from metarobot.tasks.space import Param, TaskSpace

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

VelocityFunction = Callable[[WorldState, WorldState, float], "Tensor"]
"""(before, after, control period in s) -> horizontal velocity, m/s, ``(world, 2)``."""

GOAL_RADIUS = 3.0
"""Radius of the disc that the goals of training lie on, m."""
JOINTS = tuple(f"{joint}_{leg}" for leg in range(1, 5) for joint in ("hip", "ankle"))


def observation_names(joints: Sequence[str]) -> tuple[str, ...]:
    """Return the names of what ``observe`` returns for a robot on a free joint."""
    return (
        "height_m",
        *(f"quaternion_{axis}" for axis in "wxyz"),
        *(f"{joint}_rad" for joint in joints),
        *(f"{axis}_m/s" for axis in ("x", "y", "height")),
        *(f"turn_{axis}_rad/s" for axis in "xyz"),
        *(f"{joint}_rad/s" for joint in joints),
    )


def observe(state: WorldState) -> Tensor:
    """Return positions without x and y, then velocities, ``(world, 27)`` for the ant."""
    return torch.cat([state.qpos[:, 2:], state.qvel], 1).float()


def observe_position(state: WorldState) -> Tensor:
    """Return all positions, as published, then velocities, ``(world, 29)``.

    A robot that looks for a goal must know where it is.
    """
    return torch.cat([state.qpos, state.qvel], 1).float()


def torso_velocity(before: WorldState, after: WorldState, dt: float) -> Tensor:
    """Return the mean velocity of the torso over the control step, m/s, ``(world, 2)``."""
    return (after.qpos[:, :2] - before.qpos[:, :2]) / dt


def speed_along_direction(velocity: Tensor, state: WorldState) -> Tensor:
    """Return the speed in the hidden direction, m/s, ``(world,)``."""
    angle = state.task["direction"]
    return angle.cos() * velocity[:, 0] + angle.sin() * velocity[:, 1]


def direction_reward(
    before: WorldState,
    after: WorldState,
    dt: float,
    velocity: VelocityFunction = torso_velocity,
) -> dict[str, Tensor]:
    """Return the speed in the direction, −‖a‖², and 1 for being alive.

    The last term is paid at an episode's last step too, as published.
    """
    speed = speed_along_direction(velocity(before, after, dt), after)
    return {
        "speed": speed,
        "control": -control_cost(after.action),
        "alive": torch.ones_like(speed),
    }


def readout_direction(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the torso's speed in the hidden direction."""
    velocity = torso_velocity(before, after, dt)
    return {"onward m/s": speed_along_direction(velocity, after)}


def outside_heights(state: WorldState, low: float, high: float) -> Tensor:
    """Return where the torso is not between two heights, m, ``(world,)``."""
    height = state.qpos[:, 2]
    return (height < low) | (height > high)


def vector_to_goal(state: WorldState) -> Tensor:
    """Return the vector from the torso to the goal, m, ``(world, 2)``."""
    angle = state.task["goal_angle"]
    radius = GOAL_RADIUS * state.task["goal_area"].sqrt()
    goal = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return goal - state.qpos[:, :2]


def goal_reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return −|x| − |y| to the goal, and −‖a‖²."""
    distance = vector_to_goal(after).abs().sum(1)
    return {"distance": -distance, "control": -control_cost(after.action)}


def readout_goal(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the distance to the goal."""
    return {"to goal m": vector_to_goal(after).norm(dim=1)}


def direction_space(name: str) -> TaskSpace:
    """Vary the direction over the whole circle; there is nothing to extrapolate to."""
    direction = Param(
        name="direction",
        train=Uniform(-math.pi, math.pi),
        unit="rad",
        doc="rewarded; 0 is along x, left positive",
    )
    return TaskSpace(name, (direction,))


GOAL_SPACE = TaskSpace(
    "AntGoal",
    (
        Param(
            name="goal_angle",
            train=Uniform(-math.pi, math.pi),
            unit="rad",
            doc="seen from the start, left positive",
        ),
        # Not the distance is drawn but the share of the disc that is nearer: every square metre is
        # as likely, as published.
        Param(
            name="goal_area",
            train=Uniform(0, 1),
            extrapolation=Uniform(1, (4 / 3) ** 2),
            doc=f"the goal's distance is {GOAL_RADIUS:g} m times its root",
        ),
    ),
)

ant_dir = Family(
    name="AntDir",
    doc="Walk in a direction, any of the circle, that only the reward reveals: "
    "horizon 200 (ProMP, PEARL).",
    space=direction_space("AntDir"),
    horizon=200,
    substeps=5,
    spec=partial(read_gymnasium_model, "ant.xml"),
    observations=observation_names(JOINTS),
    observe=observe,
    reward=direction_reward,
    weights={"speed": 1.0, "control": 0.5, "alive": 1.0},
    start=start,
    interaction=Interaction(terminate=partial(outside_heights, low=0.2, high=1.0)),
    display=Display(readout=readout_direction),
)

ant_goal = ant_dir.replace(
    name="AntGoal",
    doc="Find a goal within 3 m that only the reward reveals, and stay: "
    "horizon 200 (ProMP, PEARL).",
    space=GOAL_SPACE,
    observations=("x_m", "y_m", *ant_dir.observations),
    observe=observe_position,
    reward=goal_reward,
    weights={"distance": 1.0, "control": 0.1},
    terminate=None,
    readout=readout_goal,
)
