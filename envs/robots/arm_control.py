"""Control of a Panda over a table: its actions, its observation, and its joint targets.

The arm is controlled as Franka's is: displacements of the hand 25 times a second, and
``grasp(force)`` of the gripper, which closes at one speed and then presses with the force asked for
until it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from metarobot.envs.robots import panda, panda_variants
from metarobot.envs.robots.quaternions import rotation_matrix
from metarobot.envs.scenery import graspable_objects
from metarobot.lazy import lazy_module
from metarobot.tasks.family import ActionController, WorldState
from metarobot.types import Floats, constant_like

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

TIMESTEP = 0.005
"""Physics step, s."""
SUBSTEPS = 8
"""Physics steps in a control step."""
MAX_MOVE = 0.02
"""How far an action of 1 moves the hand's target in a control step, m."""
MAX_TURN = 0.12
"""How far an action of 1 turns the hand's target about the vertical in a control step, rad."""
MAX_LEAD = 0.05
"""How far the target may be ahead of the hand along each axis, m."""
# rounded to float32: the agents in the package were trained with these very numbers
WORKSPACE_LOW = np.array([0.35, -0.25, 0.013], np.float32).astype(np.float64)
"""Lowest position of the hand's target, m."""
WORKSPACE_HIGH = np.array([0.7, 0.25, 0.3], np.float32).astype(np.float64)
"""Highest position of the hand's target, m."""
WORKSPACE_CENTRE = np.array([0.5, 0.0, 0.1], np.float32).astype(np.float64)
"""Origin of observed positions, m."""
MIN_GRIP_FORCE = 0.5
"""Grip force that an action of −1 asks for, N; the action is the logarithm of the force."""
MAX_GRIP_FORCE = 60.0
"""Grip force that an action of 1 asks for, N."""
APPROACH_FORCE = 0.7
"""Force with which a finger closes until it touches something, N."""
OPENING_FORCE = 1.0
"""Force with which a finger opens, N."""
TOUCH_FORCE = 0.05
"""Force above which a pad touches something, N."""

ACTIONS = ("move_x", "move_y", "move_z", "turn", "close", "force")
ACTION_MOVE = slice(0, 3)
ACTION_TURN = 3
ACTION_CLOSE = 4
"""Above 0.5 closes the hand, below −0.5 opens it."""
ACTION_FORCE = 5
ACTION_MOTION = slice(0, 4)
"""Move and turn."""

OBSERVATIONS = (
    *(f"hand_{axis}_m" for axis in "xyz"),
    *(f"hand_{axis}_m/s" for axis in "xyz"),
    *(f"object_{axis}_m" for axis in "xyz"),
    *(f"object_x_axis_{axis}" for axis in "xyz"),
    *(f"object_z_axis_{axis}" for axis in "xyz"),
    "opening_m",
    "opening_m/s",
    "closing",
    "grasped",
)
"""Names of the elements of the observation; the object's position is seen from the hand."""
NOISE = (
    *[0.001] * 3,  # hand, position
    *[0.01] * 3,  # hand, velocity
    *[0.003] * 3,  # object, position: from a camera
    *[0.03] * 6,  # object, axes: from a camera
    0.0005,  # opening
    0.005,  # opening, velocity
    0.0,  # closing
    0.0,  # grasped
)
"""Uniform sensor noise, ± this."""

STAT_GRIP_FORCE = 0
"""Column of the episode statistics: grip force asked for, N; 0 if the hand is open."""
STAT_GRIPPED = 1
"""Column of the episode statistics: 1 if a pad has touched something since the hand closes."""
STAT_TARGET_POSITION = slice(2, 5)
"""Columns of the episode statistics: where the hand is to be, m."""
STAT_TARGET_YAW = 5
"""Column of the episode statistics: the angle to which the hand is to be turned, rad."""
ARM_STATISTICS = 6
"""Number of columns of the arm; those of a family come after them."""

_MAX_JOINT_STEP = panda.SPEED_LIMITS * SUBSTEPS * TIMESTEP
"""How far each joint can turn in a control step, rad."""
_DOWN = np.array([0.0, 0.0, -1.0])
_DAMPING = 1e-4 * np.eye(6)
_SENSORS = list(panda.SENSOR_WIDTHS)
_SENSOR_WIDTHS = list(panda.SENSOR_WIDTHS.values())


def arm_state(state: WorldState) -> ArmState:
    """Return the named sensors of a state, computed once a step."""
    arm: ArmState = state.derived or ArmState(state)
    return arm


class ArmState:
    """Sensors of the arm and the pose of the object by name, one row a world; m, rad, N, s."""

    def __init__(self, state: WorldState) -> None:
        parts = torch.split(state.sensors, _SENSOR_WIDTHS, 1)
        sensors = dict(zip(_SENSORS, parts, strict=True))

        self.joint_positions = sensors["joint_positions"].view(-1, 7, 3)
        """Position of each joint, ``(world, 7, 3)``."""
        self.joint_axes = sensors["joint_axes"].view(-1, 7, 3)
        """Direction of each joint's axis, ``(world, 7, 3)``."""
        self.joint_angles = sensors["joint_angles"]
        """``(world, 7)``."""
        self.tip_position = sensors["tip_position"]
        """Position of the point between the pads, ``(world, 3)``."""
        self.tip_velocity = sensors["tip_velocity"]
        """``(world, 3)``."""
        hand_y = sensors["hand_y"]
        self.hand_axes = torch.stack([sensors["hand_x"], hand_y, sensors["hand_z"]], 1)
        """The hand's axes as rows, ``(world, 3, 3)``; y is the closing direction, z points out."""

        left, right = torch.split(sensors["pad_positions"], 3, 1)
        self.opening = ((left - right) * hand_y).sum(1)
        """Distance between the pads, ``(world,)``."""
        left_velocity, right_velocity = torch.split(sensors["pad_velocities"], 3, 1)
        self.opening_velocity = ((left_velocity - right_velocity) * hand_y).sum(1)
        """``(world,)``."""
        self.pad_forces = sensors["pad_forces"]
        """Force on the left and on the right pad, ``(world, 2)``."""
        self.touching = self.pad_forces > TOUCH_FORCE
        """Whether each pad touches something, ``(world, 2)``."""
        self.holding = self.touching.all(1)
        """Whether both pads do, ``(world,)``."""

        self.object_position = state.qpos[:, -7:-4]
        """Position of the object's centre, ``(world, 3)``."""
        object_axes = rotation_matrix(state.qpos[:, -4:])
        self.object_x, self.object_y, self.object_z = object_axes.unbind(2)
        self.tip_to_object = self.object_position - self.tip_position
        """``(world, 3)``."""
        self.object_in_hand = (self.hand_axes @ self.tip_to_object[:, :, None])[:, :, 0]
        """Position of the object in the hand's frame, ``(world, 3)``."""
        self.resting_height = graspable_objects.resting_height(state.task)
        """Height of the object's centre when it stands on the table, ``(world,)``."""
        self.lift = self.object_position[:, 2] - self.resting_height
        """Height of the object over where it stood, ``(world,)``."""


def observe(state: WorldState) -> Tensor:
    """Return the observation, ``(world, 19)``: see ``OBSERVATIONS``."""
    arm = arm_state(state)
    closing = state.statistics[:, STAT_GRIP_FORCE] > 0
    gripper = torch.stack(
        [
            arm.opening,
            arm.opening_velocity,
            closing.to(state.statistics),
            state.statistics[:, STAT_GRIPPED],
        ],
        1,
    )
    parts = [
        arm.tip_position - constant_like(WORKSPACE_CENTRE, arm.tip_position),
        arm.tip_velocity,
        arm.tip_to_object,
        arm.object_x,
        arm.object_z,
        gripper,
    ]
    return torch.cat(parts, 1).float()


def begin_statistics(state: WorldState) -> Tensor:
    """Return the statistics of an open hand that is to stay where it is.

    Shape ``(world, ARM_STATISTICS)``.
    """
    arm = arm_state(state)
    open_hand = arm.tip_position.new_zeros(len(arm.tip_position), 2)
    return torch.cat([open_hand, arm.tip_position, _yaw(arm)[:, None]], 1)


def update_statistics(before: WorldState, after: WorldState) -> Tensor:
    """Return the arm's statistics after an action, ``(world, ARM_STATISTICS)``."""
    old = before.statistics
    old_force = old[:, STAT_GRIP_FORCE]
    close = after.action[:, ACTION_CLOSE]

    # the force is the one asked for when the hand began to close; to change it, the hand opens
    asked = requested_force(after.action[:, ACTION_FORCE])
    force = torch.where((close > 0.5) & (old_force == 0), asked, old_force)
    force = torch.where(close < -0.5, 0.0, force)

    touching = arm_state(after).touching.any(1)
    gripped = (force > 0) & (touching | (old[:, STAT_GRIPPED] > 0))
    position, yaw = _hand_target(before, after.action)
    return torch.cat([force[:, None], gripped[:, None].to(position), position, yaw[:, None]], 1)


def _yaw(arm: ArmState) -> Tensor:
    """Return the angle of the hand about the vertical, rad, ``(world,)``."""
    x_axis = arm.hand_axes[:, 0]
    return torch.atan2(x_axis[:, 1], x_axis[:, 0])


def _hand_target(state: WorldState, action: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hand's target after the action.

    Its position, m, ``(world, 3)``, and its angle about the vertical, rad, ``(world,)``.
    """
    tip = arm_state(state).tip_position
    position = state.statistics[:, STAT_TARGET_POSITION] + MAX_MOVE * action[:, ACTION_MOVE]
    position = torch.minimum(torch.maximum(position, tip - MAX_LEAD), tip + MAX_LEAD)
    position = torch.maximum(position, constant_like(WORKSPACE_LOW, position))
    position = torch.minimum(position, constant_like(WORKSPACE_HIGH, position))
    yaw = state.statistics[:, STAT_TARGET_YAW] + MAX_TURN * action[:, ACTION_TURN]
    return position, yaw.clamp(-1.0, 1.0)


def actuator_targets(state: WorldState, action: Tensor, previous: Tensor) -> Tensor:
    """Return the arm's joint targets, rad, and the grip force, N, ``(world, 8)``.

    The hand's target becomes joint targets by damped least squares, Δq = Jᵀ (J Jᵀ + λ² I)⁻¹ e: Buss
    (2004), "Introduction to inverse kinematics", eq. 11. The hand is kept pointing down.
    """
    arm = arm_state(state)
    position, yaw = _hand_target(state, action)

    # e: the error of the tip's position, and of the hand's orientation as a rotation vector
    hand_z = arm.hand_axes[:, 2]
    rotation_error = torch.linalg.cross(hand_z, constant_like(_DOWN, hand_z).expand_as(hand_z))
    rotation_error[:, 2] += yaw - _yaw(arm)
    error = torch.cat([position - arm.tip_position, rotation_error], 1)

    # J: a turn about a joint's axis moves the tip by axis × (tip − joint)
    arms_of_lever = arm.tip_position[:, None] - arm.joint_positions
    tip_motion = torch.linalg.cross(arm.joint_axes, arms_of_lever)
    jacobian = torch.cat([tip_motion, arm.joint_axes], 2).transpose(1, 2)
    jacobian_t = jacobian.transpose(1, 2)

    square = jacobian @ jacobian_t + constant_like(_DAMPING, jacobian)
    step = (jacobian_t @ torch.linalg.solve(square, error[:, :, None]))[:, :, 0]

    # if one joint would be too fast, all are slowed down: the hand then still moves straight
    excess = (step.abs() / (2 * constant_like(_MAX_JOINT_STEP, step))).amax(1, keepdim=True)
    step = step / excess.clamp_min(1)
    low = constant_like(panda.JOINT_LOW, step)
    high = constant_like(panda.JOINT_HIGH, step)
    joint_targets = (arm.joint_angles + step).clamp(low, high)

    asked = state.statistics[:, STAT_GRIP_FORCE]
    gripped = state.statistics[:, STAT_GRIPPED] > 0
    closing_force = torch.where(gripped, asked, APPROACH_FORCE)
    grip = torch.where(asked > 0, closing_force, -OPENING_FORCE)
    return torch.cat([joint_targets, grip[:, None]], 1)


def rest_targets(qpos: Tensor) -> Tensor:
    """Return the targets that hold the arm where it starts, with the hand open."""
    return torch.cat([qpos[:, :7], torch.full_like(qpos[:, :1], -OPENING_FORCE)], 1)


CONTROLLER = ActionController(actions=ACTIONS, targets=actuator_targets, rest=rest_targets)


def requested_force(action: Tensor) -> Tensor:
    """Return the grip force that an action asks for, N."""
    return MIN_GRIP_FORCE * (MAX_GRIP_FORCE / MIN_GRIP_FORCE) ** ((action + 1) / 2)


def force_action(force: Tensor) -> Tensor:
    """Return the action that asks for a grip force, N: the inverse of ``requested_force``."""
    share = torch.log(force / MIN_GRIP_FORCE) / math.log(MAX_GRIP_FORCE / MIN_GRIP_FORCE)
    return (2 * share - 1).clamp(-1, 1)


OWN_READY_POSE = np.array([*panda.READY_POSE, *2 * [panda.MAX_OPENING / 2]])
"""Joint angles of our own arm and hand at the start, before they are disturbed."""


def start(
    rng: np.random.Generator, model: mujoco.MjModel, *, ready_pose: Floats = OWN_READY_POSE
) -> tuple[Floats, Floats]:
    """Hold the hand over the table and put the object under it, both disturbed.

    Joints are off by up to 0.03 rad, the object by 5 cm and 0.5 rad from the middle.
    """
    yaw = rng.uniform(-0.5, 0.5)
    object_position = [
        WORKSPACE_CENTRE[0] + rng.uniform(-0.05, 0.05),
        rng.uniform(-0.05, 0.05),
        -model.site("bottom").pos[2],
    ]
    object_quat = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
    arm = ready_pose[:7] + rng.uniform(-0.03, 0.03, 7)
    fingers = ready_pose[7:]
    qpos = np.array([*arm, *fingers, *object_position, *object_quat])
    return qpos, np.zeros(model.nv)


def start_of(robot: str) -> Callable[[np.random.Generator, mujoco.MjModel], tuple[Floats, Floats]]:
    """Return ``start`` for our robot, or for another model if one is named."""
    return partial(start, ready_pose=panda_variants.ready_pose(robot)) if robot else start


def build_spec(robot: str = "") -> mujoco.MjSpec:
    """Build arm, table and object; ``robot`` names another model, as ``panda_variants.load``."""
    spec = panda_variants.load(robot) if robot else panda.panda()
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # hard friction: with MuJoCo's default a held object creeps out of the hand
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 100.0

    table = spec.worldbody.add_geom(
        name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.1]
    )
    table.contype = 3
    table.conaffinity = 2
    table.rgba = [0.75, 0.72, 0.68, 1]
    graspable_objects.add_object(spec)
    # another model has its actuators already; ours come after the object, as in trained agents
    return spec if robot else panda.add_actuators_and_sensors(spec)
