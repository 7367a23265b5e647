"""A Go2 that keeps a commanded speed on unknown ground, under unknown loads, with broken motors.

The robot observes what the real one measures: the direction of gravity and the angular velocity in
its own frame (IMU), joint angles and velocities, its last action and the command, with noise.
Everything else is hidden. Actions move the joints' targets around a default pose 50 times a second,
with a delay and a lag as on the robot.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from metarobot.envs.robots import go2
from metarobot.envs.robots.quaternions import rotation_matrix
from metarobot.envs.scenery import terrain
from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import Choice, LogUniform, Mixture, TaskError, Uniform
from metarobot.tasks.family import (
    Deployment,
    Display,
    Family,
    Hardware,
    Interaction,
    LeggedSensors,
    Teaching,
    WorldState,
)
from metarobot.tasks.model_edits import Edit, compile_spec
from metarobot.tasks.space import Param, SparseFaults, TaskSpace
from metarobot.types import Floats, constant_like

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

SUBSTEPS = 4
"""Physics steps of 5 ms in a control step."""
HORIZON = 200
"""Control steps in an episode: 4 s."""
LOCKED_DAMPING = 2000.0
"""Damping of a seized joint, N·m·s/rad.

The weight of the whole robot moves it by less than 1 degree in an episode."""
HEALTHY_DAMPING = 0.1
"""Damping of every other joint, N·m·s/rad."""
EXTRAPOLATION_JOINTS = ("FL_hip", "RR_thigh", "RL_calf")
"""Joints that break in the split ``extrapolate`` alone, one of each kind."""
MIN_TRUNK_HEIGHT = 0.17
"""Height of the trunk over the lowest foot below which it has fallen, m: no gait kneels."""
MIN_UPRIGHTNESS = 0.7
"""Cosine of the trunk's tilt below which it has fallen."""
CONTACT_FORCE = 1.0
"""Force above which a foot is in contact, N."""
SWING_HEIGHT = 0.07
"""How high feet are to swing, m."""

OBSERVATIONS = (
    *(f"gravity_{axis}" for axis in "xyz"),
    *(f"turn_{axis}_rad/s" for axis in "xyz"),
    *(f"{joint}_rad" for joint in go2.JOINTS),
    *(f"{joint}_rad/s" for joint in go2.JOINTS),
    *(f"{joint}_action" for joint in go2.JOINTS),
    "command_x_m/s",
    "command_y_m/s",
    "command_turn_rad/s",
)
"""Names of the elements of the observation."""
COMMANDS = OBSERVATIONS[-3:]
"""The observations that an operator sets on a real robot."""
NOISE = (
    *[0.05] * 3,  # gravity
    *[0.2] * 3,  # angular velocity
    *[0.01] * 12,  # joint angles
    *[1.5] * 12,  # joint velocities
    *[0.0] * 12,  # last action
    *[0.0] * 3,  # command
)
"""Uniform sensor noise, ± this, as Unitree's own training assumes it."""
WEIGHTS = {
    "track": 2.0,  # horizontal velocity as commanded
    "turn": 0.3,  # rate of turn as commanded
    "swing": 0.8,  # feet in the air are high and fast
    "bounce": 0.2,  # vertical velocity
    "wobble": 0.1,  # roll and pitch rate
    "tilt": 0.3,  # roll and pitch
    "effort": 0.05,  # torques
    "jerk": 0.1,  # changes of the action
    "slip": 0.25,  # feet on the ground slide
    "pose": 0.2,  # joints off the default pose
    "limits": 0.1,  # torques and speeds near their limits
}
"""Reward term -> its weight; ``reward`` computes the terms."""

Columns = slice | list[int]
"""Where ``qvel`` has the joints in our order; another model may have its legs in another order."""
OWN_COLUMNS = slice(6, 18)
"""Where our own Go2 has them."""


def joint_state(state: WorldState, columns: Columns) -> tuple[Tensor, Tensor]:
    """Return the joints' offsets from the default pose, rad, and velocities, rad/s.

    Shape ``(world, 12)`` each.
    """
    angles = state.qpos[:, 1:][:, columns]
    return angles - constant_like(go2.DEFAULT_POSE, state.qpos), state.qvel[:, columns]


def derive_rotation(state: WorldState) -> Tensor:
    """Return the rotation from the trunk's frame to the world's, ``(world, 3, 3)``.

    The environment calls it once a step (``Interaction.derive``) and keeps the result.
    """
    return rotation_matrix(state.qpos[:, 3:7])


def trunk_rotation(state: WorldState) -> Tensor:
    """Return the rotation from the trunk's frame to the world's, computed once a step."""
    rotation: Tensor = derive_rotation(state) if state.derived is None else state.derived
    return rotation


def gravity_direction(state: WorldState) -> Tensor:
    """Return the direction of gravity in the trunk's frame, ``(world, 3)``.

    On a slope the world's gravity is turned, not its ground.
    """
    rotation = trunk_rotation(state)
    if "slope" not in state.task:
        return -rotation[:, 2]
    slope = torch.deg2rad(state.task["slope"])[:, None]
    return -slope.sin() * rotation[:, 0] - slope.cos() * rotation[:, 2]


def trunk_velocity(state: WorldState) -> Tensor:
    """Return the trunk's velocity in its own frame, m/s, ``(world, 3)``."""
    return (trunk_rotation(state) * state.qvel[:, :3, None]).sum(1)


def trunk_angular_velocity(state: WorldState) -> Tensor:
    """Return the trunk's angular velocity in its own frame, rad/s, ``(world, 3)``."""
    return state.qvel[:, 3:6]


def command(state: WorldState) -> Tensor:
    """Return the command, ``(world, 3)``: velocity forward and left, m/s, rate of turn, rad/s."""
    zero = torch.zeros_like(state.qpos[:, 0])
    forward = state.task.get("command_x", zero)
    turn = state.task.get("command_turn", zero)
    return torch.stack([forward, zero, turn], 1)


def observe(
    state: WorldState, *, hide_command: bool = False, columns: Columns = OWN_COLUMNS
) -> Tensor:
    """Return the observation, ``(world, 45)``; a hidden command is zero."""
    gravity = gravity_direction(state)
    shown_command = torch.zeros_like(gravity) if hide_command else command(state)
    angles, velocities = joint_state(state, columns)
    parts = [
        gravity,
        trunk_angular_velocity(state),
        angles,
        velocities,
        state.action,
        shown_command,
    ]
    return torch.cat(parts, 1).float()


class QuadrupedSensors:
    """The model's sensors by name, ``(world, leg)`` or ``(world, joint)``."""

    def __init__(self, state: WorldState) -> None:
        position, velocity, force, torque = torch.split(state.sensors, [12, 12, 4, 12], 1)
        self.foot_height = position[:, 2::3]
        """Height of each foot's centre, m."""
        self.foot_speed = torch.hypot(velocity[:, 0::3], velocity[:, 1::3])
        """Horizontal speed of each foot, m/s."""
        self.in_contact = force > CONTACT_FORCE
        """Whether each foot is on the ground."""
        self.torque = torque
        """Torque of each joint, N·m."""


def critic_observe(state: WorldState) -> Tensor:
    """Return what the robot cannot measure, ``(world, 14)``.

    The trunk's velocity, its height over each foot, which feet are in contact, and the command.
    """
    sensors = QuadrupedSensors(state)
    height = state.qpos[:, 2:3] - sensors.foot_height
    parts = [trunk_velocity(state), height, sensors.in_contact, command(state)]
    return torch.cat(parts, 1).float()


_COST_OF_SQUARES = np.repeat(
    np.diag([4, 0.25, 10 / 12, 1 / 12, 2 / 12]), [1, 2, 12, 12, 12], axis=0
)
"""``(39, 5)``: from squares to the costs bounce, wobble, effort, jerk and pose.

The squares are those of vertical velocity, roll and pitch rate, torques, changes of action, and
joint offsets. One matrix product is faster than five weighted sums."""
_SLIP_WEIGHTS = np.full(4, 4.0)
_LIMIT_WEIGHTS = np.full(24, 10.0)
_MEAN_OVER_FEET = np.full(4, 0.25)


def reward(
    before: WorldState, after: WorldState, dt: float, *, columns: Columns = OWN_COLUMNS
) -> dict[str, Tensor]:
    """Return named terms: tracking and swing in [0, 1], all costs in [−1, 0].

    Costs are squashed by −tanh, so that no broken state outweighs the rest of an episode.
    """
    offsets, velocities = joint_state(after, columns)
    rotation = trunk_rotation(after)
    velocity = trunk_velocity(after)
    angular_velocity = trunk_angular_velocity(after)
    wanted = command(after)
    sensors = QuadrupedSensors(after)
    torque = sensors.torque / constant_like(go2.TORQUE_LIMITS, sensors.torque)
    speed = velocities / constant_like(go2.SPEED_LIMITS, velocities)

    # tracking: steep where the error is small, and not flat where it is large
    error = torch.hypot(velocity[:, 0] - wanted[:, 0], velocity[:, 1] - wanted[:, 1])
    track = 1 - torch.tanh(2 * error)
    turn = torch.exp(-4 * (angular_velocity[:, 2] - wanted[:, 2]).square())

    # each foot's swing is rewarded alone: fast and high; not where the command is to stand
    swing_height = ((sensors.foot_height - go2.FOOT_RADIUS) / SWING_HEIGHT).clamp(0, 1)
    swing = torch.tanh(2 * ~sensors.in_contact * swing_height.square() * sensors.foot_speed)
    swing = swing @ constant_like(_MEAN_OVER_FEET, swing)
    swing = swing * (torch.hypot(wanted[:, 0], wanted[:, 1]) / 0.3).clamp_max(1)

    changes = after.action - before.action
    squares = torch.cat(
        [velocity[:, 2:], angular_velocity[:, :2], torque, changes, offsets], 1
    ).square()
    weighted = squares @ constant_like(_COST_OF_SQUARES, squares)
    bounce, wobble, effort, jerk, pose = weighted.unbind(1)

    # feet in contact are not to slide
    slide = sensors.in_contact * sensors.foot_speed.square()
    # torques and speeds may reach 90 % of their limits for nothing
    excess = (torch.cat([torque, speed], 1).abs() - 0.9).clamp_min(0)

    costs = {
        "bounce": bounce,
        "wobble": wobble,
        "tilt": 10 * (1 - rotation[:, 2, 2]),
        "effort": effort,
        "jerk": jerk,
        "slip": slide @ constant_like(_SLIP_WEIGHTS, slide),
        "pose": pose,
        "limits": excess @ constant_like(_LIMIT_WEIGHTS, excess),
    }
    bounded = -torch.tanh(torch.stack(list(costs.values())))
    return {
        "track": track,
        "turn": turn,
        "swing": swing,
        **dict(zip(costs, bounded, strict=True)),
    }


def start(
    rng: np.random.Generator, model: mujoco.MjModel, *, columns: Columns = OWN_COLUMNS
) -> tuple[Floats, Floats]:
    """Stand in the default pose, disturbed.

    Joints and heading are off by up to 0.1 rad, velocities by 0.1 (standard deviation).
    """
    yaw = rng.uniform(-0.1, 0.1)
    qpos = np.zeros(model.nq)
    qpos[2] = go2.START_HEIGHT
    qpos[3] = np.cos(yaw / 2)
    qpos[6] = np.sin(yaw / 2)
    qpos[1:][columns] = go2.DEFAULT_POSE + rng.uniform(-0.1, 0.1, 12)

    # drawn in our order, so that a model with its legs in another order starts in the same state
    noise = 0.1 * rng.standard_normal(model.nv)
    qvel = noise.copy()
    qvel[columns] = noise[OWN_COLUMNS]
    return qpos, qvel


def fallen(state: WorldState) -> Tensor:
    """Return where the trunk is tilted by more than 45 degrees or is down between its feet."""
    lowest_foot = state.sensors[:, 2:12:3].amin(1)
    too_low = state.qpos[:, 2] - lowest_foot < MIN_TRUNK_HEIGHT
    # the last element of the trunk's rotation matrix: the cosine of its tilt
    uprightness = 1 - 2 * state.qpos[:, 4:6].square().sum(1)
    return too_low | (uprightness < MIN_UPRIGHTNESS)


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the forward speed and the commanded one."""
    return {"speed m/s": trunk_velocity(after)[:, 0], "wanted m/s": command(after)[:, 0]}


def broken_links(task: Mapping[str, float]) -> list[str]:
    """Return the names of the links that a weak, dead or locked joint moves."""
    return [name for name in go2.JOINTS if task.get(name, 1.0) < 0.6]


def edit_spec(spec: mujoco.MjSpec, task: Mapping[str, float]) -> None:
    """Write terrain, broken joints and latency into the model."""
    if "terrain" in task:
        ground = terrain.heights(int(task["terrain"]), task["roughness"], int(task["terrain_seed"]))
        terrain.set_heights(spec, ground)
    for i, name in enumerate(go2.JOINTS):
        actuator = spec.actuator(name)
        health = task.get(name, 1.0)
        locked = health < 0
        go2.set_strength(actuator, i, max(health, 0.0))
        spec.joint(actuator.target).damping[0] = LOCKED_DAMPING if locked else HEALTHY_DAMPING
        go2.set_latency(actuator, task.get("latency", go2.LATENCY))


FRICTION = Param(
    name="friction",
    train=LogUniform(0.4, 1.2),
    extrapolation=LogUniform(0.2, 0.4),
    edits=(Edit(element="geom", name="floor", field="friction", index=0),),
    doc="sliding friction of the floor",
)
SLOPE = Param(
    name="slope",
    train=Uniform(-8, 8),
    held_out=(2.0, 4.0),
    extrapolation=Uniform(8, 12),
    edits=(Edit(element="option", field="gravity", op="rotate_y"),),
    unit="deg",
    doc="positive is uphill",
)
TERRAIN = (
    Param(
        name="roughness",
        train=Uniform(0.02, 0.08),
        extrapolation=Uniform(0.08, 0.12),
        edits_spec=True,
        unit="m",
        doc="from the lowest to the highest point",
    ),
    Param(
        name="terrain",
        train=Choice((0.0, 1.0, 2.0)),
        extrapolation=Choice((3.0,)),
        edits_spec=True,
        doc="kind of ground",
        words=tuple(f"{i} {k}" for i, k in enumerate(terrain.TERRAIN_KINDS)),
    ),
    Param(
        name="terrain_seed",
        train=Choice(tuple(map(float, range(10_000)))),
        edits_spec=True,
        nuisance=True,
        doc="draws the ground",
    ),
)
PAYLOAD = (
    Param(
        name="payload",
        train=Uniform(0.001, 4),
        extrapolation=Uniform(4, 6),
        edits=(Edit(element="geom", name="payload", field="mass"),),
        unit="kg",
        doc="on the trunk of the 15.2 kg robot",
    ),
    Param(
        name="payload_x",
        train=Uniform(-0.12, 0.12),
        edits=(Edit(element="body", name="payload", field="pos", index=0),),
        unit="m",
        doc="how far forward it sits",
    ),
    Param(
        name="payload_y",
        train=Uniform(-0.06, 0.06),
        edits=(Edit(element="body", name="payload", field="pos", index=1),),
        unit="m",
        doc="how far left it sits",
    ),
)
LATENCY = Param(
    name="latency",
    train=Choice((0.005, 0.01, 0.015, 0.02)),
    extrapolation=Choice((0.03, 0.04)),
    edits_spec=True,
    unit="s",
    doc="from action to drive, in whole physics steps",
)


def command_speed(low: float, high: float, extrapolation_high: float) -> Param:
    """Return the parameter of the commanded forward speed, m/s."""
    return Param(
        name="command_x",
        train=Uniform(low, high),
        extrapolation=Uniform(high, extrapolation_high),
        unit="m/s",
        doc="forward speed",
    )


COMMAND_TURN = Param(
    name="command_turn", train=Uniform(-0.6, 0.6), unit="rad/s", doc="rate of turn, left positive"
)


def joint_health(name: str) -> Param:
    """Return the parameter of one joint's actuator: healthy, weak, dead or locked."""
    healthy = Uniform(0.9, 1.1)
    weak = Uniform(0.2, 0.5)
    dead = Choice((0.0,))
    locked = Choice((-1.0,))
    return Param(
        name=name,
        train=Mixture((0.83, 0.06, 0.07, 0.04), (healthy, weak, dead, locked)),
        edits_spec=True,
        doc="torque factor of its drive; 0 is dead, -1 locked",
        words=("0 dead", "-1 locked"),
    )


JOINT_HEALTH = tuple(joint_health(name) for name in go2.JOINTS)


def joint_faults(least: int, most: int) -> SparseFaults:
    """Return the rule that ``least`` to ``most`` joints are broken in a task."""
    return SparseFaults(
        params=tuple(j for j in go2.JOINTS if j not in EXTRAPOLATION_JOINTS),
        least=least,
        most=most,
        extrapolation_params=EXTRAPOLATION_JOINTS,
    )


def quadruped_family(
    name: str,
    doc: str,
    params: tuple[Param, ...],
    sparse_faults: tuple[SparseFaults, ...] = (),
    *,
    hide_command: bool = False,
    robot: str = "",
) -> Family:
    """Build a family of tasks for a quadruped.

    Args:
        name: Name of the family and of its task space.
        doc: One sentence on what the agent must find out.
        params: What varies.
        sparse_faults: How many joints break at a time.
        hide_command: Whether the command is kept from the agent.
        robot: Another model: a path to an MJCF file or ``menagerie:name``; our own Go2 if empty.

    Raises:
        TaskError: The robot could run off the terrain.
        ModelError: The other model does not fit.
    """
    space = TaskSpace(name, params, sparse_faults)
    rough = "terrain" in space.names
    if rough:
        _check_terrain_size(name, params)
    columns = go2.joint_columns(go2.robot_spec(robot)) if robot else OWN_COLUMNS

    def on_robot(other: str) -> Family:
        return quadruped_family(
            name, doc, params, sparse_faults, hide_command=hide_command, robot=other
        )

    return Family(
        name=name,
        doc=doc,
        space=space,
        horizon=HORIZON,
        substeps=SUBSTEPS,
        spec=partial(build_spec, robot, rough=rough, loaded="payload" in space.names),
        observations=OBSERVATIONS,
        observe=partial(observe, hide_command=hide_command, columns=columns),
        reward=partial(reward, columns=columns),
        weights=WEIGHTS,
        start=partial(start, columns=columns),
        interaction=Interaction(
            edit_spec=edit_spec, derive=derive_rotation, noise=NOISE, terminate=fallen
        ),
        teaching=Teaching(critic_observe=critic_observe),
        display=Display(readout=readout, highlight=broken_links),
        deployment=Deployment(
            on_robot=on_robot, hardware=partial(hardware, robot, hide_command=hide_command)
        ),
    )


def _check_terrain_size(name: str, params: tuple[Param, ...]) -> None:
    """Refuse speeds at which the robot could run off the terrain.

    Raises:
        TaskError: The distance of an episode, with a margin of 30 %, exceeds the terrain.
    """
    speed = 0.0
    for param in params:
        if param.name == "command_x":
            extrapolation_high = param.extrapolation.high if param.extrapolation else 0
            speed = max(param.train.high, extrapolation_high)
    episode_s = HORIZON * SUBSTEPS * go2.TIMESTEP
    if episode_s * 1.3 * speed > terrain.HALF_LENGTH:
        raise TaskError(
            f"{name}: a terrain of {2 * terrain.HALF_LENGTH:g} m "
            f"does not fit a speed of {speed:g} m/s"
        )


def build_spec(robot: str, *, rough: bool, loaded: bool) -> mujoco.MjSpec:
    """Build the robot on level or rough ground, with or without a payload."""
    spec = go2.robot_spec(robot)
    if not loaded:
        spec.delete(spec.body("payload"))
    return terrain.add_height_field(spec) if rough else spec


def hardware(robot: str, *, hide_command: bool) -> Hardware:
    """Return the settings of the real robot's motors, and what it needs to compute its reward.

    ``metarobot.bridge.layouts.legged`` computes the same reward from the robot's own signals.
    """
    compiled = compile_spec(go2.robot_spec(robot))
    reward_settings = {
        "kind": "quadruped",
        "legs": go2.leg_geometry(compiled),
        "foot_radius": go2.FOOT_RADIUS,
        "step_height": SWING_HEIGHT,
        "touch": CONTACT_FORCE,
        "lowest": MIN_TRUNK_HEIGHT,
        "upright": MIN_UPRIGHTNESS,
    }
    return Hardware(
        **go2.actuator_settings(compiled),
        commands=() if hide_command else COMMANDS,
        sensors=LeggedSensors(
            gravity=OBSERVATIONS[:3],
            gyro=OBSERVATIONS[3:6],
            joint_position=OBSERVATIONS[6:18],
            joint_velocity=OBSERVATIONS[18:30],
            joint_torque=tuple(f"{joint}_torque" for joint in go2.JOINTS),
            foot_force={leg: f"{leg}_touch" for leg in go2.LEGS},
        ),
        reward=reward_settings,
    )


quadruped_flat = quadruped_family(
    "QuadrupedFlat",
    "Walk and turn as commanded on level ground of unknown friction: horizon 200, 50 Hz.",
    (command_speed(0.0, 1.0, 1.3), COMMAND_TURN, FRICTION),
)
quadruped_vel = quadruped_family(
    "QuadrupedVel",
    "Walk at a speed that only the reward reveals: U[0, 1] m/s, horizon 200, 50 Hz.",
    (command_speed(0.0, 1.0, 1.3),),
    hide_command=True,
)
quadruped_terrain = quadruped_family(
    "QuadrupedTerrain",
    "Keep a commanded speed on a slope and rough ground that is felt, not seen: "
    "horizon 200, 50 Hz.",
    (command_speed(0.4, 0.8, 1.0), FRICTION, SLOPE, *TERRAIN),
)
quadruped_damage = quadruped_family(
    "QuadrupedDamage",
    "Keep a commanded speed with one or two joints weak, dead or locked: horizon 200, 50 Hz.",
    (command_speed(0.4, 0.8, 1.0), *JOINT_HEALTH),
    (joint_faults(1, 2),),
)
quadruped_mix = quadruped_family(
    "QuadrupedMix",
    "Keep a commanded speed with everything unknown: ground, load, latency and up to two "
    "broken joints.",
    (command_speed(0.4, 0.8, 1.0), FRICTION, SLOPE, *TERRAIN, *PAYLOAD, LATENCY, *JOINT_HEALTH),
    (joint_faults(0, 2),),
)
