"""A Panda over a table: how it is commanded, and what is seen of it and of the object before it.

The arm is commanded as Franka's is: displacements of the hand 25 times a second, and
``grasp(force)`` of the hand, which closes at one speed and then presses with the force asked for
until it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.envs.robots import panda
from metarobot.envs.robots import panda_variants as arms
from metarobot.envs.robots.quaternions import rotation
from metarobot.envs.scenery import graspable_objects as objects
from metarobot.tasks.family import ActionController, WorldState
from metarobot.types import Floats, constant_like

SUBSTEPS, TIMESTEP = 8, 0.005
"""Physics steps a control step, of so many seconds."""
REACH, TURN = 0.02, 0.12
"""What an action of 1 moves the hand's aim by in a control step: m, and rad about the vertical."""
AHEAD = 0.05
"""How far the aim may be ahead of the hand, m."""
LOWEST, HIGHEST = (
    torch.tensor([0.35, -0.25, 0.013]).double(),
    torch.tensor([0.7, 0.25, 0.3]).double(),
)
"""The box that the aim stays in, m."""
WEAKEST, STRONGEST = 0.5, 60.0
"""Grip forces that can be asked for, N; the action between is their logarithm."""
APPROACH, OPEN = 0.7, 1.0
"""Force on a finger that closes until it touches, and that opens, N."""
CENTRE = torch.tensor([0.5, 0.0, 0.1]).double()
"""Middle of the workspace, m; positions are observed from it."""
ACTIONS = ("move_x", "move_y", "move_z", "turn", "close", "force")
OBSERVATIONS = (
    *(f"hand_{a}_m" for a in "xyz"),
    *(f"hand_{a}_m/s" for a in "xyz"),
    *(f"object_{a}_m" for a in "xyz"),
    *(f"object_x_axis_{a}" for a in "xyz"),
    *(f"object_z_axis_{a}" for a in "xyz"),
    "opening_m",
    "opening_m/s",
    "closing",
    "grasped",
)
NOISE = (*[0.001] * 3, *[0.01] * 3, *[0.003] * 3, *[0.03] * 6, 0.0005, 0.005, 0.0, 0.0)
"""Uniform, ± so much: the object's pose comes from a camera."""

FORCE, GRIPPED, AIM, YAW, HAND = 0, 1, slice(2, 5), 5, 6
"""Of the statistics: force asked for, N (0 open), whether a pad has met something since, and where
the hand is to be, m and rad; and how many columns that takes."""

_STEP = torch.from_numpy(panda.SPEED * SUBSTEPS * TIMESTEP)
_LOW, _HIGH = torch.from_numpy(panda.LOW), torch.from_numpy(panda.HIGH)
_DOWN, _EYE = torch.tensor([0.0, 0.0, -1.0]).double(), torch.eye(6).double()


def scene_of(state: WorldState) -> Scene:
    """Return what the sensors say of a moment, computed once."""
    scene: Scene = state.derived or Scene(state)
    return scene


class Scene:
    """What the sensors and joints say, one row a world; m, rad, N, s."""

    def __init__(self, state: WorldState) -> None:
        joints, pointing, self.tip, x, y, z, self.speed, self.pads, self.angles, pads, moving = (
            torch.split(state.sensors, [21, 21, 3, 3, 3, 3, 3, 2, 7, 6, 6], 1)
        )
        self.joints, self.axes, self.hand = (
            joints.view(-1, 7, 3),
            pointing.view(-1, 7, 3),
            torch.stack([x, y, z], 1),
        )
        self.opening = ((pads[:, :3] - pads[:, 3:]) * y).sum(1)
        self.closing = ((moving[:, :3] - moving[:, 3:]) * y).sum(1)
        self.object, turned = state.qpos[:, -7:-4], rotation(state.qpos[:, -4:])
        self.x, self.y, self.z = turned.unbind(2)
        self.offset = self.object - self.tip
        self.within = (self.hand @ self.offset[:, :, None])[:, :, 0]
        """Where the object is in the hand's frame, ``(world, 3)``."""
        self.touched = self.pads > 0.05
        self.held = self.touched.all(1)
        self.rest = objects.rest(state.task)
        """How high the object's middle is when it stands on the table, ``(world,)``."""
        self.lift = self.object[:, 2] - self.rest


def observe(state: WorldState) -> Tensor:
    """Return ``(world, 19)``: see ``OBSERVATIONS``."""
    scene, statistics = scene_of(state), state.statistics
    fingers = torch.stack(
        [
            scene.opening,
            scene.closing,
            (statistics[:, FORCE] > 0).to(statistics),
            statistics[:, GRIPPED],
        ],
        1,
    )
    return torch.cat(
        [
            scene.tip - constant_like(CENTRE, scene.tip),
            scene.speed,
            scene.offset,
            scene.x,
            scene.z,
            fingers,
        ],
        1,
    ).float()


def begin(state: WorldState) -> Tensor:
    """Return the statistics of a hand that is open and to stay where it is, ``(world, HAND)``."""
    tip, x = state.sensors[:, 42:45], state.sensors[:, 45:48]
    still = tip.new_zeros(len(tip), 2)
    return torch.cat([still, tip, torch.atan2(x[:, 1], x[:, 0])[:, None]], 1)


def count(before: WorldState, after: WorldState, scene: Scene) -> Tensor:
    """Return the hand's statistics after an action, ``(world, HAND)``; ``scene`` is what is
    after.
    """
    old, close = before.statistics, after.action[:, 4]
    asked = WEAKEST * (STRONGEST / WEAKEST) ** ((after.action[:, 5] + 1) / 2)
    force = torch.where((close > 0.5) & (old[:, FORCE] == 0), asked, old[:, FORCE])
    force = torch.where(close < -0.5, 0.0, force)
    gripped = (force > 0) & (scene.touched.any(1) | (old[:, GRIPPED] > 0))
    place, turn = _aim(before, after.action)
    return torch.cat([force[:, None], gripped[:, None].to(place), place, turn[:, None]], 1)


def _aim(state: WorldState, action: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the hand is to be after the action: its place ``(world, 3)``, m, and its turn
    ``(world,)``, rad.
    """
    tip, statistics = state.sensors[:, 42:45], state.statistics
    place = statistics[:, AIM] + REACH * action[:, :3]
    place = torch.minimum(torch.maximum(place, tip - AHEAD), tip + AHEAD)
    turn = (statistics[:, YAW] + TURN * action[:, 3]).clamp(-1.0, 1.0)
    return torch.minimum(
        torch.maximum(place, constant_like(LOWEST, place)), constant_like(HIGHEST, place)
    ), turn


def targets(state: WorldState, action: Tensor, told: Tensor) -> Tensor:
    """Turn the aim of the hand into joint targets, by damped least squares, and the grip into a
    force, N.

    Damped least squares: Buss (2004), "Introduction to inverse kinematics", eq. 11. The hand is
    kept pointing down.
    """
    scene = scene_of(state)
    place, turn = _aim(state, action)
    x = scene.hand[:, 0]
    upset = torch.linalg.cross(scene.hand[:, 2], constant_like(_DOWN, x).expand_as(x))
    upset[:, 2] += turn - torch.atan2(x[:, 1], x[:, 0])
    lever = torch.linalg.cross(scene.axes, scene.tip[:, None] - scene.joints)
    jacobian = torch.cat([lever, scene.axes], 2).transpose(1, 2)
    square = jacobian @ jacobian.transpose(1, 2) + 1e-4 * constant_like(_EYE, jacobian)
    twist = torch.linalg.solve(square, torch.cat([place - scene.tip, upset], 1)[:, :, None])
    step = (jacobian.transpose(1, 2) @ twist)[:, :, 0]
    # too fast for one joint is too fast for all: slower, but straight
    step = step / (step.abs() / (2 * constant_like(_STEP, step))).amax(1, keepdim=True).clamp_min(1)
    arm = (scene.angles + step).clamp(constant_like(_LOW, step), constant_like(_HIGH, step))
    asked, gripped = state.statistics[:, FORCE], state.statistics[:, GRIPPED] > 0
    grip = torch.where(asked > 0, torch.where(gripped, asked, APPROACH), -OPEN)
    return torch.cat([arm, grip[:, None]], 1)


def rest(qpos: Tensor) -> Tensor:
    """Hold the arm where it starts, the hand open."""
    return torch.cat([qpos[:, :7], torch.full_like(qpos[:, :1], -OPEN)], 1)


CONTROL = ActionController(actions=ACTIONS, targets=targets, rest=rest)


def strength(force: Tensor) -> Tensor:
    """Return the action that asks for a grip force, N."""
    return (2 * torch.log(force / WEAKEST) / math.log(STRONGEST / WEAKEST) - 1).clamp(-1, 1)


OURS = np.array([*panda.READY, *2 * [panda.STROKE / 2]])
"""Joint angles of our own arm and hand at the start, before they are disturbed."""


def start(
    rng: np.random.Generator, model: mujoco.MjModel, *, ready: Floats = OURS
) -> tuple[Floats, Floats]:
    """Hold the hand over the table, joints within ±0.03 rad; put the object within 5 cm and 0.5 rad
    of its middle.
    """
    yaw = rng.uniform(-0.5, 0.5)
    place = [
        CENTRE[0] + rng.uniform(-0.05, 0.05),
        rng.uniform(-0.05, 0.05),
        -model.site("bottom").pos[2],
    ]
    arm, fingers = ready[:7] + rng.uniform(-0.03, 0.03, 7), ready[7:]
    return np.array([*arm, *fingers, *place, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]), np.zeros(
        model.nv
    )


def starter(robot: str) -> Callable[[np.random.Generator, mujoco.MjModel], tuple[Floats, Floats]]:
    """Return how episodes start with our robot, or with another model of it."""
    return partial(start, ready=arms.ready(robot)) if robot else start


def build(robot: str = "") -> mujoco.MjSpec:
    """Build arm, table and object; with another model of the robot, as ``arms.load`` has it."""
    spec = arms.load(robot) if robot else panda.panda()
    spec.option.timestep, spec.option.integrator = TIMESTEP, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 100.0
    table = spec.worldbody.add_geom(
        name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.1]
    )
    table.contype, table.conaffinity, table.rgba = 3, 2, [0.75, 0.72, 0.68, 1]
    objects.add(spec)
    return spec if robot else panda.equip(spec)
