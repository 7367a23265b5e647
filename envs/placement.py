"""A Panda that puts objects where they belong: the K-shot object task.

Each task has several classes of objects, and each class has a place of its own. The class of the
presented object is observed, as a code of its colours and texture. Where it belongs is hidden and
differs from task to task: the agent finds it out by trial, or from demonstrations.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from metarobot.envs.grasp import SIZE, turn_to_object
from metarobot.envs.robots import arm_control
from metarobot.envs.robots.arm_control import (
    ACTION_MOTION,
    ARM_STATISTICS,
    MAX_MOVE,
    MAX_TURN,
    STAT_GRIP_FORCE,
    STAT_GRIPPED,
    STAT_TARGET_POSITION,
    TOUCH_FORCE,
    ArmState,
    arm_state,
)
from metarobot.envs.scenery import graspable_objects
from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import Choice, LogUniform
from metarobot.tasks.family import (
    Deployment,
    Display,
    EpisodeStatistics,
    Family,
    Interaction,
    Teaching,
    WorldState,
)
from metarobot.tasks.space import Param, TaskSpace
from metarobot.types import Floats, constant_like

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

HORIZON = 120
"""Control steps in an episode: 4.8 s."""
CLASSES = 4
"""Classes of objects in a task, each with a place of its own."""
TRAINING_CLASSES = 1000
"""Classes in all for training; as many others are for extrapolation."""
CODE_LENGTH = 16
"""Length of the code in which colours and texture are observed."""
# rounded to float32, as the workspace
PLACES = np.array([[0.42, -0.2], [0.62, -0.12], [0.62, 0.12], [0.42, 0.2]], np.float32).astype(
    np.float64
)
"""Centres of the places, x and y, m."""
PLACE_RADIUS = 0.04
"""Distance from a place's centre within which an object is in the place, m."""
SETTLED_STEPS = 5
"""Control steps after which an object that was let go counts as put down."""
CARRY_HEIGHT = 0.13
"""Height at which the expert carries the object, m."""
OBSERVATIONS = (*arm_control.OBSERVATIONS, *(f"code_{i}" for i in range(CODE_LENGTH)))
"""Names of the elements of the observation."""
NOISE = (*arm_control.NOISE, *[0.05] * CODE_LENGTH)
"""Uniform sensor noise, ± this."""
OBSERVATIONS_WITH_PLACE = (*arm_control.OBSERVATIONS, "place_x_m", "place_y_m")
"""Names of the elements of the observation where the right place is shown."""
NOISE_WITH_PLACE = (*arm_control.NOISE, 0.005, 0.005)
WEIGHTS = {
    "reach": 0.3,  # the hand is near the object
    "grip": 0.3,  # both pads hold it
    "carry": 1.0,  # it is near its place, and was lifted
    "success": 20.0,  # it was put down in its place
    "wrong": 10.0,  # it was put down in another
    "calm": 0.05,  # the hand moves slowly
}
"""Reward term -> its weight; ``reward`` computes the terms."""

STAT_STEPS_DOWN = ARM_STATISTICS
"""Column of the episode statistics: control steps the object has lain in a place, let go of."""
STAT_CARRIED = ARM_STATISTICS + 1
"""Column of the episode statistics: 1 once the object has been lifted."""
STAT_SUCCESS = ARM_STATISTICS + 2
"""Column of the episode statistics: 1 once the object was put down where it belongs."""
STAT_WRONG_PLACE = ARM_STATISTICS + 3
"""Column of the episode statistics: 1 once it was put down in another place."""
STATISTICS_SIZE = ARM_STATISTICS + 4

_PLACE_ORDERS = np.array(list(permutations(range(CLASSES))))
"""``(order, class)``: the place of each class under each order."""


@cache
def class_codes() -> Floats:
    """Return the code of every class, ``(2 * TRAINING_CLASSES, CODE_LENGTH)``: unit vectors.

    They are always the same; the second half is for extrapolation.
    """
    rng = np.random.Generator(np.random.PCG64(20))
    draws = rng.standard_normal((2 * TRAINING_CLASSES, CODE_LENGTH))
    units: Floats = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    return units


def right_place(state: WorldState) -> Tensor:
    """Return the centre of the place where the presented object belongs, ``(world, 2)``, m."""
    orders = constant_like(_PLACE_ORDERS, state.variant)
    place = orders[state.task["order"].long(), state.variant]
    return constant_like(PLACES, state.qpos)[place]


def distance_to_place(state: WorldState) -> Tensor:
    """Return the horizontal distance from the object to its place, m, ``(world,)``."""
    offset = arm_state(state).object_position[:, :2] - right_place(state)
    distance: Tensor = offset.norm(dim=1)
    return distance


def presented_code(state: WorldState) -> Tensor:
    """Return the code of the presented object's class, ``(world, CODE_LENGTH)``."""
    classes = torch.stack([state.task[f"class_{i}"] for i in range(CLASSES)], 1).long()
    presented = classes.gather(1, state.variant[:, None])[:, 0]
    row = presented + TRAINING_CLASSES * state.task["unseen"].long()
    return constant_like(class_codes(), state.qpos)[row]


def observe(state: WorldState) -> Tensor:
    """Return the observation of a grasping arm and the presented object's code, ``(world, 35)``."""
    return torch.cat([arm_control.observe(state), presented_code(state).float()], 1)


def observe_with_place(state: WorldState) -> Tensor:
    """Return the observation of a grasping arm and where the object belongs, ``(world, 21)``.

    The place is relative to the workspace's centre, as all positions are.
    """
    centre = constant_like(arm_control.WORKSPACE_CENTRE, state.qpos)[:2]
    place = right_place(state) - centre
    return torch.cat([arm_control.observe(state), place.float()], 1)


def critic_observe(state: WorldState) -> Tensor:
    """Return the vector from the object to its place and the statistics, ``(world, 6)``."""
    to_place = right_place(state) - arm_state(state).object_position[:, :2]
    return torch.cat([10 * to_place, state.statistics[:, ARM_STATISTICS:]], 1).float()


def begin_statistics(state: WorldState) -> Tensor:
    """Return the statistics of an open hand and an object that was not placed yet."""
    arm = arm_control.begin_statistics(state)
    return torch.nn.functional.pad(arm, (0, STATISTICS_SIZE - ARM_STATISTICS))


def update_statistics(before: WorldState, after: WorldState) -> Tensor:
    """Return the episode statistics after an action, ``(world, STATISTICS_SIZE)``."""
    old = before.statistics
    arm = arm_state(after)
    arm_statistics = arm_control.update_statistics(before, after)

    # down: in any place, on the table, and let go of
    position = arm.object_position[:, :2]
    distances = torch.cdist(position, constant_like(PLACES, arm.object_position))
    in_a_place = distances.amin(1) < PLACE_RADIUS
    on_table = arm.lift.abs() < 0.01
    let_go = (arm_statistics[:, STAT_GRIP_FORCE] == 0) & (arm.pad_forces.amax(1) < TOUCH_FORCE)
    down = let_go & on_table & in_a_place
    steps_down = torch.where(down, old[:, STAT_STEPS_DOWN] + 1, 0.0)

    carried = (old[:, STAT_CARRIED] > 0) | (arm.holding & (arm.lift > 0.02))
    settled = steps_down >= SETTLED_STEPS
    right = distance_to_place(after) < PLACE_RADIUS
    success = (old[:, STAT_SUCCESS] > 0) | (settled & right)
    wrong = (old[:, STAT_WRONG_PLACE] > 0) | (settled & ~right)

    # in the order of the columns
    own = [steps_down, carried, success, wrong]
    columns = [column.to(arm_statistics) for column in own]
    return torch.cat([arm_statistics, torch.stack(columns, 1)], 1)


def reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return named terms in [0, 1], costs in [−1, 0].

    ``success`` and ``wrong`` are paid once an episode, at the step where it happens.
    """
    arm = arm_state(after)
    old = before.statistics
    new = after.statistics
    return {
        "reach": 1 - torch.tanh(8 * arm.tip_to_object.norm(dim=1)),
        "grip": new[:, STAT_GRIPPED] * arm.holding,
        "carry": new[:, STAT_CARRIED] * (1 - torch.tanh(5 * distance_to_place(after))),
        "success": new[:, STAT_SUCCESS] - old[:, STAT_SUCCESS],
        "wrong": old[:, STAT_WRONG_PLACE] - new[:, STAT_WRONG_PLACE],
        "calm": -after.action[:, ACTION_MOTION].square().mean(1),
    }


def finished(state: WorldState) -> Tensor:
    """Return where the object was put down in a place, or is out of reach."""
    position = arm_state(state).object_position
    low = constant_like(arm_control.WORKSPACE_LOW, position)[:2]
    high = constant_like(arm_control.WORKSPACE_HIGH, position)[:2]
    outside = (position[:, :2] < low - 0.1) | (position[:, :2] > high + 0.1)
    success = state.statistics[:, STAT_SUCCESS] > 0
    wrong = state.statistics[:, STAT_WRONG_PLACE] > 0
    return success | wrong | outside.any(1)


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show which class is presented and how far it is from its place."""
    return {"class": after.variant + 1.0, "to its place cm": 100 * distance_to_place(after)}


def expert(state: WorldState) -> Tensor:
    """Return the actions of a program that is told the task, ``(world, 6)``.

    It goes over the object, down, and closes; then up, across, down, and opens; then up again.
    """
    arm = arm_state(state)
    statistics = state.statistics
    target = statistics[:, STAT_TARGET_POSITION]
    goal = right_place(state)
    closed = statistics[:, STAT_GRIP_FORCE] > 0
    carried = statistics[:, STAT_CARRIED] > 0
    grasped = closed & arm.holding & (statistics[:, STAT_GRIPPED] > 0)
    leaving = carried & ~closed
    offset = arm.tip_to_object[:, :2].norm(dim=1)
    at_goal = distance_to_place(state) < 0.02

    # height: down to the object, up to carry it, down at the goal, and up when it is let go of
    grasp_height = (arm.resting_height - 0.002).clamp_min(0.014)
    before_grasp = torch.where(offset < 0.01, grasp_height, grasp_height + 0.06)
    with_object = torch.where(at_goal, grasp_height, CARRY_HEIGHT)
    height = torch.where(closed, torch.where(grasped, with_object, grasp_height), before_grasp)
    height = torch.where(leaving, 0.16, height)

    # horizontally: to the object; across only once it is clear of the table; or stay
    stay = target[:, :2]
    lifted = arm.object_position[:, 2] > arm.resting_height + 0.03
    across = torch.where((lifted | at_goal)[:, None], goal - arm.tip_to_object[:, :2], stay)
    to_object = torch.where(closed[:, None], stay, arm.object_position[:, :2])
    horizontal = torch.where(grasped[:, None], across, to_object)
    horizontal = torch.where(leaving[:, None], stay, horizontal)

    move = (torch.cat([horizontal, height[:, None]], 1) - target) / MAX_MOVE
    move = torch.cat([move[:, :2].clamp(-0.6, 0.6), move[:, 2:].clamp(-1.0, 0.5)], 1)
    turn = torch.where(closed | carried, 0.0, turn_to_object(state, arm) / MAX_TURN)

    still = arm.tip_velocity.norm(dim=1) < 0.08
    at_height = (arm.tip_position[:, 2] - grasp_height).abs() < 0.006
    ready = (offset < 0.006) & at_height & still & ~carried
    landed = arm.object_position[:, 2] < arm.resting_height + 0.005
    release = carried & closed & at_goal & landed & still
    close = torch.where((closed & ~release) | ready, 1.0, -1.0)

    # one and a half times what just holds, and a little more
    wanted = 1 + 3 * state.task["mass"] * 9.81 / (2 * state.task["friction"])
    force = arm_control.force_action(wanted)
    return torch.cat([move, torch.stack([turn, close, force], 1)], 1).clamp(-1, 1)


def class_param(i: int) -> Param:
    """Return the parameter of one of a task's classes; no two of a task are alike."""
    candidates = tuple(float(c) for c in range(i, TRAINING_CLASSES, CLASSES))
    return Param(
        name=f"class_{i}", train=Choice(candidates), nuisance=True, doc="a class of objects"
    )


NEW_CLASSES = Param(
    name="unseen",
    train=Choice((0.0,)),
    extrapolation=Choice((1.0,)),
    nuisance=True,
    doc="whether all classes are others, that are never trained on",
)
PLACE_ORDER = Param(
    name="order",
    train=Choice(tuple(float(i) for i in range(len(_PLACE_ORDERS)))),
    doc="which class belongs where: a permutation",
)
OBJECT_KIND = Param(
    name="kind",
    train=Choice((0.0, 1.0)),
    edits_spec=True,
    doc="shape",
    words=tuple(f"{i} {k}" for i, k in enumerate(graspable_objects.OBJECT_KINDS)),
)
OBJECT_SIZE = tuple(replace(param, extrapolation=None) for param in SIZE)
OBJECT_MASS = Param(
    name="mass", train=LogUniform(0.05, 0.3), edits_spec=True, unit="kg", doc="of the object"
)
OBJECT_FRICTION = Param(
    name="friction", train=LogUniform(0.6, 1.2), edits_spec=True, doc="of the object"
)
PARAMS = (
    *(class_param(i) for i in range(CLASSES)),
    NEW_CLASSES,
    PLACE_ORDER,
    OBJECT_KIND,
    *OBJECT_SIZE,
    OBJECT_MASS,
    OBJECT_FRICTION,
)


def placement_family(name: str, doc: str, *, show_place: bool = False, robot: str = "") -> Family:
    """Build a family of placement tasks.

    Args:
        name: Name of the family and of its task space.
        doc: One sentence on what the agent must find out.
        show_place: Whether the agent observes where the object belongs instead of what it is.
        robot: Another model of the arm: a path to an MJCF file or ``menagerie:name``; our own Panda
            if empty.

    Raises:
        ModelError: The other model does not fit.
    """

    def on_robot(other: str) -> Family:
        return placement_family(name, doc, show_place=show_place, robot=other)

    return Family(
        name=name,
        doc=doc,
        space=TaskSpace(name, PARAMS),
        horizon=HORIZON,
        substeps=arm_control.SUBSTEPS,
        spec=partial(arm_control.build_spec, robot),
        observations=OBSERVATIONS_WITH_PLACE if show_place else OBSERVATIONS,
        observe=observe_with_place if show_place else observe,
        reward=reward,
        weights=WEIGHTS,
        start=arm_control.start_of(robot),
        interaction=Interaction(
            edit_spec=graspable_objects.edit_object,
            derive=ArmState,
            noise=NOISE_WITH_PLACE if show_place else NOISE,
            controller=arm_control.CONTROLLER,
            statistics=EpisodeStatistics(
                size=STATISTICS_SIZE, begin=begin_statistics, update=update_statistics
            ),
            variants=CLASSES,
            terminate=finished,
        ),
        teaching=Teaching(critic_observe=critic_observe, expert=expert),
        display=Display(readout=readout, view=((0.5, 0.0, 0.15), 0.38)),
        deployment=Deployment(on_robot=on_robot),
    )


placement_task = placement_family(
    "Placement",
    "Put each class of objects in its place, which demonstrations show or trials reveal: "
    "horizon 120, 25 Hz.",
)
placement_shown = placement_family(
    "PlacementShown",
    "The same with the right place in view, in the code's stead: what Placement is compared with.",
    show_place=True,
)
