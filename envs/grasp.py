"""A Panda that lifts objects of unknown shape, weight and friction without crushing them.

It observes where the object and the hand are and what the fingers do. Weight, friction and
fragility are hidden, and size is known only from the fingers.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from metarobot.envs.robots import arm_control, panda
from metarobot.envs.robots.arm_control import (
    ACTION_MOTION,
    ARM_STATISTICS,
    MAX_MOVE,
    MAX_TURN,
    STAT_GRIP_FORCE,
    STAT_GRIPPED,
    STAT_TARGET_POSITION,
    STAT_TARGET_YAW,
    ArmState,
    arm_state,
)
from metarobot.envs.scenery import graspable_objects
from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import Choice, LogUniform, Uniform
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
from metarobot.types import constant_like

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

HORIZON = 100
"""Control steps in an episode: 4 s."""
HOLD_STEPS = 25
"""Control steps (1 s) that an object must be held for success."""
LIFT_HEIGHT = 0.10
"""Height at which an object must be held for success, m."""
MAX_SLIP = 0.005
"""How far the object may move in the hand while it is held, m."""
DROP_HEIGHT = 0.03
"""An object that was lifted this high and has come down by as much is dropped, m."""
MAX_DISTANCE = 0.3
"""Distance of the object from the workspace's centre at which it is out of reach, m."""
GRAVITY = 9.81
"""m/s²."""
WEIGHTS = {
    "reach": 0.5,  # the hand is near the object
    "grip": 0.5,  # both pads hold it
    "lift": 1.0,  # it is high
    "hold": 1.0,  # it has been held for long
    "success": 20.0,  # long enough
    "crush": 5.0,
    "drop": 5.0,
    "calm": 0.05,  # the hand moves slowly
    "effort": 0.3,  # the grip force is small
}
"""Reward term -> its weight; ``reward`` computes the terms."""

STAT_STEPS_HELD = ARM_STATISTICS
"""Column of the episode statistics: control steps the object has been held without a break."""
STAT_ANCHOR = slice(ARM_STATISTICS + 1, ARM_STATISTICS + 4)
"""Columns of the episode statistics: where in the hand the object was when that began, m."""
STAT_SUCCESS = ARM_STATISTICS + 4
"""Column of the episode statistics: 1 once the object has been held long enough."""
STAT_CRUSHED = ARM_STATISTICS + 5
"""Column of the episode statistics: 1 once the object is crushed."""
STAT_DROPPED = ARM_STATISTICS + 6
"""Column of the episode statistics: 1 once the object was dropped."""
STAT_HIGHEST_LIFT = ARM_STATISTICS + 7
"""Column of the episode statistics: highest lift of the object so far, m."""
STATISTICS_SIZE = ARM_STATISTICS + 8


def holding_force(state: WorldState) -> Tensor:
    """Return the grip force that just holds the object, N, ``(world,)``.

    Two pads and Coulomb's law: F = m g / 2 μ.
    """
    return state.task["mass"] * GRAVITY / (2 * state.task["friction"])


def crushing_force(state: WorldState) -> Tensor:
    """Return the grip force that crushes the object, N, ``(world,)``; infinite if none does."""
    if "room" not in state.task:
        return torch.full_like(state.qpos[:, 0], torch.inf)
    return state.task["room"] * holding_force(state)


def begin_statistics(state: WorldState) -> Tensor:
    """Return the statistics of an open hand and an object that was not lifted yet."""
    arm = arm_control.begin_statistics(state)
    return torch.nn.functional.pad(arm, (0, STATISTICS_SIZE - ARM_STATISTICS))


def update_statistics(before: WorldState, after: WorldState) -> Tensor:
    """Return the episode statistics after an action, ``(world, STATISTICS_SIZE)``."""
    old = before.statistics
    arm = arm_state(after)
    arm_statistics = arm_control.update_statistics(before, after)

    # held: high enough, between both pads, and not slipping since that began
    lifted = (arm.lift >= LIFT_HEIGHT) & (arm_statistics[:, STAT_GRIPPED] > 0) & arm.holding
    slip = (arm.object_in_hand - old[:, STAT_ANCHOR]).norm(dim=1)
    begins = old[:, STAT_STEPS_HELD] == 0
    steps_held = torch.where(
        lifted & (begins | (slip < MAX_SLIP)), old[:, STAT_STEPS_HELD] + 1, 0.0
    )
    anchor = torch.where((steps_held <= 1)[:, None], arm.object_in_hand, old[:, STAT_ANCHOR])

    crushed = (old[:, STAT_CRUSHED] > 0) | (arm.pad_forces.amax(1) > crushing_force(after))
    highest_lift = torch.maximum(old[:, STAT_HIGHEST_LIFT], arm.lift)
    has_fallen = (highest_lift > DROP_HEIGHT) & (arm.lift < highest_lift - DROP_HEIGHT)
    dropped = (old[:, STAT_DROPPED] > 0) | (has_fallen & ~arm.holding)
    success = (old[:, STAT_SUCCESS] > 0) | ((steps_held >= HOLD_STEPS) & ~crushed)

    # in the order of the columns
    own = [steps_held, *anchor.unbind(1), success, crushed, dropped, highest_lift]
    columns = [column.to(arm_statistics) for column in own]
    return torch.cat([arm_statistics, torch.stack(columns, 1)], 1)


def critic_observe(state: WorldState) -> Tensor:
    """Return what the robot cannot measure, ``(world, 9)``.

    The forces on the pads, how long the object has been held, success, crushed and dropped, its
    highest lift, and the logarithms of the grip force asked for and of the one that just holds.
    """
    statistics = state.statistics
    parts = [
        arm_state(state).pad_forces / 10,
        statistics[:, [STAT_STEPS_HELD]] / HOLD_STEPS,
        statistics[:, [STAT_SUCCESS, STAT_CRUSHED, STAT_DROPPED]],
        10 * statistics[:, [STAT_HIGHEST_LIFT]],
        (statistics[:, [STAT_GRIP_FORCE]] + 1).log(),
        (holding_force(state)[:, None] + 1).log(),
    ]
    return torch.cat(parts, 1).float()


def reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return named terms in [0, 1], costs in [−1, 0].

    ``success``, ``crush`` and ``drop`` are paid once an episode, at the step where it happens.
    """
    arm = arm_state(after)
    old = before.statistics
    new = after.statistics
    distance = arm.tip_to_object.square().sum(1).sqrt()
    # 1 while both pads hold the object
    grip = new[:, STAT_GRIPPED] * arm.holding
    return {
        "reach": 1 - torch.tanh(8 * distance),
        "grip": grip,
        "lift": grip * (arm.lift / LIFT_HEIGHT).clamp(0, 1),
        "hold": (new[:, STAT_STEPS_HELD] / HOLD_STEPS).clamp_max(1),
        "success": new[:, STAT_SUCCESS] - old[:, STAT_SUCCESS],
        "crush": old[:, STAT_CRUSHED] - new[:, STAT_CRUSHED],
        "drop": old[:, STAT_DROPPED] - new[:, STAT_DROPPED],
        "calm": -after.action[:, ACTION_MOTION].square().mean(1),
        # among the forces that hold, the smallest is best
        "effort": -new[:, STAT_GRIPPED] * new[:, STAT_GRIP_FORCE] / arm_control.MAX_GRIP_FORCE,
    }


def failed(state: WorldState) -> Tensor:
    """Return where the object is crushed, dropped or out of reach, or the hand is jammed."""
    arm = arm_state(state)
    centre = constant_like(arm_control.WORKSPACE_CENTRE, arm.object_position)[:2]
    offset = (arm.object_position[:, :2] - centre).abs().amax(1)
    out_of_reach = offset > MAX_DISTANCE
    jammed = arm.pad_forces.amax(1) > 3 * panda.MAX_GRIP_FORCE
    crushed = state.statistics[:, STAT_CRUSHED] > 0
    dropped = state.statistics[:, STAT_DROPPED] > 0
    return crushed | dropped | out_of_reach | jammed


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the grip force and the object's height."""
    arm = arm_state(after)
    return {"grip N": arm.pad_forces.amax(1), "lift cm": 100 * arm.lift}


def turn_to_object(state: WorldState, arm: ArmState) -> Tensor:
    """Return the turn that puts the closing direction along the object's y axis, rad.

    Along or against it, whichever is nearer.
    """
    y_axis = arm.object_y[:, :2]
    return torch.atan(-y_axis[:, 0] / y_axis[:, 1]) - state.statistics[:, STAT_TARGET_YAW]


def expert(state: WorldState) -> Tensor:
    """Return the actions of a program that is told the task, ``(world, 6)``.

    It goes over the object, down, closes with twice the force needed, and lifts. With a crushing
    force, it takes the geometric mean of what holds and what crushes, if that is less.
    """
    arm = arm_state(state)
    statistics = state.statistics
    closed = statistics[:, STAT_GRIP_FORCE] > 0
    grasped = closed & arm.holding
    target = statistics[:, STAT_TARGET_POSITION]
    offset = arm.tip_to_object[:, :2].norm(dim=1)

    # height: down once the hand is over the object, up once it is grasped
    grasp_height = (arm.resting_height - 0.002).clamp_min(0.014)
    before_lift = torch.where(closed | (offset < 0.01), grasp_height, grasp_height + 0.06)
    lifting = grasped | (statistics[:, STAT_HIGHEST_LIFT] > 0.01)
    height = torch.where(lifting, 0.18, before_lift)

    # horizontally: to the object until the hand closes
    horizontal = torch.where(closed[:, None], target[:, :2], arm.object_position[:, :2])
    move = (torch.cat([horizontal, height[:, None]], 1) - target) / MAX_MOVE
    move[:, 2].clamp_max_(0.4)
    turn = torch.where(closed, 0.0, turn_to_object(state, arm)) / MAX_TURN

    at_height = (arm.tip_position[:, 2] - grasp_height).abs() < 0.004
    ready = (offset < 0.003) & at_height & (arm.tip_velocity.norm(dim=1) < 0.02)
    close = torch.where(closed | ready, 1.0, -1.0)

    needed = holding_force(state)
    wanted = torch.minimum(2 * needed, torch.sqrt(needed * crushing_force(state)))
    force = arm_control.force_action(wanted)
    return torch.cat([move, torch.stack([turn, close, force], 1)], 1).clamp(-1, 1)


def teacher_action(state: WorldState) -> Tensor:
    """Return the expert's action as far as it is to be distilled, ``(world, 6)``, NaN elsewhere.

    Which force to ask for, and once it is asked for how to lift; not how to get there.
    """
    action = expert(state)
    reaching = state.statistics[:, STAT_GRIP_FORCE] == 0
    action[:, :5] = torch.where(reaching[:, None], torch.nan, action[:, :5])
    return action


SIZE = (
    Param(
        name="width",
        train=Uniform(0.03, 0.064),
        extrapolation=Uniform(0.022, 0.03),
        edits_spec=True,
        unit="m",
        doc="across the fingers",
    ),
    Param(name="length", train=Uniform(1.0, 1.5), edits_spec=True, doc="in widths"),
    Param(name="height", train=Uniform(0.04, 0.08), edits_spec=True, unit="m", doc="upwards"),
)
SHAPE = (
    Param(
        name="kind",
        train=Choice((0.0, 1.0, 2.0, 3.0)),
        extrapolation=Choice((4.0, 5.0)),
        edits_spec=True,
        doc="shape",
        words=tuple(f"{i} {k}" for i, k in enumerate(graspable_objects.OBJECT_KINDS)),
    ),
    Param(
        name="shape_seed",
        train=Choice(tuple(map(float, range(1000)))),
        edits_spec=True,
        nuisance=True,
        doc="draws a superquadric",
    ),
)
CENTRE_OF_MASS = tuple(
    Param(
        name=f"centre_{a}",
        train=Uniform(-0.5, 0.5),
        edits_spec=True,
        doc=f"how far along {a} a fifth of the mass sits, in half-sizes",
    )
    for a in "xy"
)
CRUSH_MARGIN = Param(
    name="room",
    train=Uniform(2.0, 3.0),
    extrapolation=Uniform(1.7, 2.0),
    doc="grip force that crushes it, in forces that just hold it",
)


def object_mass(low: float, high: float, extrapolation_high: float) -> Param:
    """Return the parameter of the object's mass, kg."""
    return Param(
        name="mass",
        train=LogUniform(low, high),
        extrapolation=LogUniform(high, extrapolation_high),
        edits_spec=True,
        unit="kg",
        doc="of the object",
    )


def object_friction(low: float, high: float, extrapolation_low: float) -> Param:
    """Return the parameter of the friction between the object and what touches it."""
    return Param(
        name="friction",
        train=LogUniform(low, high),
        extrapolation=LogUniform(extrapolation_low, low),
        edits_spec=True,
        doc="of the object",
    )


def grasp_family(name: str, doc: str, params: tuple[Param, ...], *, robot: str = "") -> Family:
    """Build a family of grasping tasks.

    Args:
        name: Name of the family and of its task space.
        doc: One sentence on what the agent must find out.
        params: What varies.
        robot: Another model of the arm: a path to an MJCF file or ``menagerie:name``; our own Panda
            if empty.

    Raises:
        ModelError: The other model does not fit.
    """

    def on_robot(other: str) -> Family:
        return grasp_family(name, doc, params, robot=other)

    return Family(
        name=name,
        doc=doc,
        space=TaskSpace(name, params),
        horizon=HORIZON,
        substeps=arm_control.SUBSTEPS,
        spec=partial(arm_control.build_spec, robot),
        observations=arm_control.OBSERVATIONS,
        observe=arm_control.observe,
        reward=reward,
        weights=WEIGHTS,
        start=arm_control.start_of(robot),
        interaction=Interaction(
            edit_spec=graspable_objects.edit_object,
            derive=ArmState,
            noise=arm_control.NOISE,
            controller=arm_control.CONTROLLER,
            statistics=EpisodeStatistics(
                size=STATISTICS_SIZE, begin=begin_statistics, update=update_statistics
            ),
            terminate=failed,
        ),
        teaching=Teaching(
            critic_observe=critic_observe, expert=expert, teacher_action=teacher_action
        ),
        display=Display(readout=readout, view=((0.5, 0.0, 0.17), 0.3)),
        deployment=Deployment(on_robot=on_robot),
    )


grasp_shapes = grasp_family(
    "GraspShapes",
    "Lift objects of unknown shape, size, weight and friction and hold them: horizon 100, 25 Hz.",
    (*SHAPE, *SIZE, object_mass(0.05, 0.5, 0.8), object_friction(0.4, 1.2, 0.3)),
)
grasp_fragile = grasp_family(
    "GraspFragile",
    "Find the grip force between what drops and what crushes a box, each another one: "
    "horizon 100, 25 Hz.",
    (*SIZE, object_mass(0.15, 0.8, 1.0), object_friction(0.25, 1.0, 0.2), CRUSH_MARGIN),
)
grasp_mix = grasp_family(
    "GraspMix",
    "Lift objects of which nothing is known, shape, weight, balance, friction or fragility: "
    "horizon 100, 25 Hz.",
    (
        *SHAPE,
        *SIZE,
        object_mass(0.1, 0.6, 0.8),
        object_friction(0.3, 1.0, 0.25),
        *CENTRE_OF_MASS,
        CRUSH_MARGIN,
    ),
)
