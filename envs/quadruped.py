"""A Go2 that has to keep a commanded speed on unknown ground, under unknown loads, with broken
motors.

The robot observes what the real one measures: the direction of gravity and the angular velocity in
its own frame (IMU), joint angles and velocities, its last action and the command, with noise.
Everything else is hidden. Actions move the joints' targets around a default pose, 50 times a
second, late and lagging as on the robot.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.envs.robots import go2
from metarobot.envs.robots.quaternions import rotation
from metarobot.envs.scenery import terrain
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
from metarobot.tasks.mujoco_models import Edit, compile_spec
from metarobot.tasks.space import Param, SparseFaults, TaskSpace
from metarobot.types import Floats, constant_like

SUBSTEPS, HORIZON = 4, 200
"""Physics steps of 5 ms a control step; control steps an episode."""
LOCK = 2000.0
"""Damping of a seized joint, N·m·s/rad: the whole robot's weight moves it by less than 1 degree in
an episode."""
SPARED = ("FL_hip", "RR_thigh", "RL_calf")
"""Joints that break in ``extrapolate`` alone, one of each kind."""
LOWEST, UPRIGHT = 0.17, 0.7
"""Height of the trunk over the lowest foot, m, and cosine of its tilt, below which it has fallen:
no gait kneels."""
TOUCH = 1.0
"""Force on a foot that is down, N."""
STEP_HEIGHT = 0.07
"""How high feet are to swing, m."""

OBSERVATIONS = (
    *(f"gravity_{a}" for a in "xyz"),
    *(f"turn_{a}_rad/s" for a in "xyz"),
    *(f"{j}_rad" for j in go2.JOINTS),
    *(f"{j}_rad/s" for j in go2.JOINTS),
    *(f"{j}_action" for j in go2.JOINTS),
    "command_x_m/s",
    "command_y_m/s",
    "command_turn_rad/s",
)
NOISE = (*[0.05] * 3, *[0.2] * 3, *[0.01] * 12, *[1.5] * 12, *[0.0] * 12, *[0.0] * 3)
"""Uniform sensor noise as Unitree's own training assumes it, ± so much."""
WEIGHTS = {
    "track": 2.0,
    "turn": 0.3,
    "swing": 0.8,
    "bounce": 0.2,
    "wobble": 0.1,
    "tilt": 0.3,
    "effort": 0.05,
    "jerk": 0.1,
    "slip": 0.25,
    "pose": 0.2,
    "limits": 0.1,
}

POSE, TORQUE, SPEED = (torch.from_numpy(x) for x in (go2.POSE, go2.TORQUE, go2.SPEED))


Columns = slice | list[int]
"""Where ``qvel`` holds the joints in our order; another model may have its legs in another."""
OURS = slice(6, 18)


def joints(state: WorldState, where: Columns) -> tuple[Tensor, Tensor]:
    """Return the joints' angles off the default pose, rad, and their velocities, rad/s, ``(world,
    12)`` each.
    """
    return state.qpos[:, 1:][:, where] - constant_like(POSE, state.qpos), state.qvel[:, where]


def trunk_rotation(state: WorldState) -> Tensor:
    """Return the trunk's rotation from its own frame to the world's, ``(world, 3, 3)``."""
    return rotation(state.qpos[:, 3:7])


def turned(state: WorldState) -> Tensor:
    """Return what ``trunk_rotation`` made of a moment."""
    turn: Tensor = trunk_rotation(state) if state.derived is None else state.derived
    return turn


def gravity(state: WorldState, turn: Tensor) -> Tensor:
    """Return the direction of gravity in the trunk's frame, ``(world, 3)``; a slope is gravity
    turned.
    """
    if "slope" not in state.task:
        return -turn[:, 2]
    slope = torch.deg2rad(state.task["slope"])[:, None]
    return -slope.sin() * turn[:, 0] - slope.cos() * turn[:, 2]


def velocity(state: WorldState, turn: Tensor) -> Tensor:
    """Return the trunk's velocity in its own frame, m/s, ``(world, 3)``."""
    return (turn * state.qvel[:, :3, None]).sum(1)


def command(state: WorldState) -> Tensor:
    """Return the commanded forward and sideways velocity, m/s, and rate of turn, rad/s, ``(world,
    3)``.
    """
    zero = torch.zeros_like(state.qpos[:, 0])
    return torch.stack(
        [state.task.get("command_x", zero), zero, state.task.get("command_turn", zero)], 1
    )


def observe(state: WorldState, *, hidden: bool = False, where: Columns = OURS) -> Tensor:
    """Return ``(world, 45)``; with a hidden command, zeros in its place."""
    down = gravity(state, turned(state))
    told = torch.zeros_like(down) if hidden else command(state)
    return torch.cat(
        [down, state.qvel[:, 3:6], *joints(state, where), state.action, told], 1
    ).float()


class Feet:
    """What the sensors say of the feet, ``(world, 4)`` in the order of the legs, and of the
    drives.
    """

    def __init__(self, state: WorldState) -> None:
        place, motion, force, self.torque = torch.split(state.sensors, [12, 12, 4, 12], 1)
        self.height = place[:, 2::3]
        self.speed = torch.hypot(motion[:, 0::3], motion[:, 1::3])
        self.down = force > TOUCH


def critic_observe(state: WorldState) -> Tensor:
    """Return what the robot cannot measure: its velocity, its height over its feet, and which feet
    are down.
    """
    feet, height = Feet(state), state.qpos[:, 2:3]
    return torch.cat(
        [velocity(state, turned(state)), height - feet.height, feet.down, command(state)], 1
    ).float()


_SQUARES = torch.from_numpy(
    np.repeat(np.diag([4, 0.25, 10 / 12, 1 / 12, 2 / 12]), [1, 2, 12, 12, 12], axis=0)
)
"""Adds the squares of velocity up, spin, torques, change of action and pose up to five costs,
``(39, 5)``."""
_ONES = torch.ones(24, dtype=torch.float64)


def reward(
    before: WorldState, after: WorldState, dt: float, *, where: Columns = OURS
) -> dict[str, Tensor]:
    """Return named terms: tracking and swing in [0, 1], everything else in [−1, 0]."""
    pose, fast = joints(after, where)
    turn, feet, wanted = turned(after), Feet(after), command(after)
    moving, spin = velocity(after, turn), after.qvel[:, 3:6]
    ones = constant_like(_ONES, feet.torque)
    torque = feet.torque / constant_like(TORQUE, feet.torque)
    squared = torch.cat(
        [moving[:, 2:], spin[:, :2], torque, after.action - before.action, pose], 1
    ).square()
    bounce, wobble, effort, jerk, crouch = (squared @ constant_like(_SQUARES, squared)).unbind(1)
    costs = {
        "bounce": bounce,
        "wobble": wobble,
        "tilt": 10 * (1 - turn[:, 2, 2]),
        "effort": effort,
        "jerk": jerk,
        "slip": (feet.down * feet.speed.square()) @ (4 * ones[:4]),
        "pose": crouch,
        "limits": (torch.cat([torque, fast / constant_like(SPEED, fast)], 1).abs() - 0.9).clamp_min(
            0
        )
        @ (10 * ones),
    }
    # steep where the error is small, and not flat where it is large
    off = torch.hypot(moving[:, 0] - wanted[:, 0], moving[:, 1] - wanted[:, 1])
    track, turning = 1 - torch.tanh(2 * off), torch.exp(-4 * (spin[:, 2] - wanted[:, 2]).square())
    # each foot's swing for itself: fast and high; not where the command is to stand
    high = ((feet.height - go2.FOOT) / STEP_HEIGHT).clamp(0, 1)
    swing = torch.tanh(2 * ~feet.down * high.square() * feet.speed) @ (0.25 * ones[:4])
    swing = swing * (torch.hypot(wanted[:, 0], wanted[:, 1]) / 0.3).clamp_max(1)
    bounded = -torch.tanh(torch.stack(list(costs.values())))
    return {
        "track": track,
        "turn": turning,
        "swing": swing,
        **dict(zip(costs, bounded, strict=True)),
    }


def start(
    rng: np.random.Generator, model: mujoco.MjModel, *, where: Columns = OURS
) -> tuple[Floats, Floats]:
    """Stand in the default pose, disturbed: joints by ±0.1 rad, heading by ±0.1 rad, velocities by
    0.1.
    """
    qpos = np.zeros(model.nq)
    yaw = rng.uniform(-0.1, 0.1)
    qpos[2], qpos[3], qpos[6] = go2.START, np.cos(yaw / 2), np.sin(yaw / 2)
    qpos[1:][where] = go2.POSE + rng.uniform(-0.1, 0.1, 12)
    noise = 0.1 * rng.standard_normal(model.nv)
    qvel = noise.copy()
    qvel[where] = noise[OURS]
    return qpos, qvel


def fallen(state: WorldState) -> Tensor:
    """Say where the trunk is tilted by more than 45 degrees, or sinks down between its feet."""
    low = state.qpos[:, 2] - state.sensors[:, 2:12:3].amin(1) < LOWEST
    upright = 1 - 2 * state.qpos[:, 4:6].square().sum(1)
    return low | (upright < UPRIGHT)


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the speed and what was commanded."""
    return {"speed m/s": velocity(after, turned(after))[:, 0], "wanted m/s": command(after)[:, 0]}


def broken_links(task: Mapping[str, float]) -> list[str]:
    """Name the links that a weak, dead or locked joint moves."""
    return [name for name in go2.JOINTS if task.get(name, 1.0) < 0.6]


def shape(spec: mujoco.MjSpec, task: Mapping[str, float]) -> None:
    """Write terrain, broken joints and latency into the model."""
    if "terrain" in task:
        ground = terrain.heights(int(task["terrain"]), task["roughness"], int(task["terrain_seed"]))
        terrain.shape(spec, ground)
    for i, name in enumerate(go2.JOINTS):
        drive = spec.actuator(name)
        health = task.get(name, 1.0)
        go2.set_strength(drive, i, max(health, 0.0))
        spec.joint(drive.target).damping[0] = LOCK if health < 0 else 0.1
        go2.set_latency(drive, task.get("latency", go2.LATENCY))


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
        words=tuple(f"{i} {k}" for i, k in enumerate(terrain.KINDS)),
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


def commanded(low: float, high: float, beyond: float) -> Param:
    """Build the commanded forward speed."""
    return Param(
        name="command_x",
        train=Uniform(low, high),
        extrapolation=Uniform(high, beyond),
        unit="m/s",
        doc="forward speed",
    )


def joint(name: str) -> Param:
    """Build the health of one joint's drive: healthy, weak, dead or locked."""
    return Param(
        name=name,
        train=Mixture(
            (0.83, 0.06, 0.07, 0.04),
            (Uniform(0.9, 1.1), Uniform(0.2, 0.5), Choice((0.0,)), Choice((-1.0,))),
        ),
        edits_spec=True,
        doc="torque factor of its drive; 0 is dead, -1 locked",
        words=("0 dead", "-1 locked"),
    )


def broken(least: int, most: int) -> SparseFaults:
    """Break so many joints at a time."""
    return SparseFaults(
        params=tuple(j for j in go2.JOINTS if j not in SPARED),
        least=least,
        most=most,
        extrapolation_params=SPARED,
    )


HEALTH = tuple(joint(name) for name in go2.JOINTS)


def quadruped(
    name: str,
    doc: str,
    params: tuple[Param, ...],
    few: tuple[SparseFaults, ...] = (),
    *,
    hidden: bool = False,
    robot: str = "",
) -> Family:
    """Build a family; ``hidden`` keeps the command from the robot, ``robot`` is another model of
    it.
    """
    space = TaskSpace(name, params, few)
    rough = "terrain" in space.names
    fast = next(
        (
            max(p.train.high, p.extrapolation.high if p.extrapolation else 0)
            for p in params
            if p.name == "command_x"
        ),
        0.0,
    )
    if rough and HORIZON * SUBSTEPS * go2.TIMESTEP * 1.3 * fast > terrain.RADIUS:
        raise TaskError(
            f"{name}: a terrain of {2 * terrain.RADIUS:g} m does not fit a speed of {fast:g} m/s"
        )
    where = go2.columns(go2.model(robot)) if robot else OURS
    return Family(
        name=name,
        doc=doc,
        space=space,
        horizon=HORIZON,
        substeps=SUBSTEPS,
        spec=partial(_build, robot, rough, "payload" in space.names),
        observations=OBSERVATIONS,
        observe=partial(observe, hidden=hidden, where=where),
        reward=partial(reward, where=where),
        weights=WEIGHTS,
        start=partial(start, where=where),
        interaction=Interaction(
            edit_spec=shape,
            derive=trunk_rotation,
            noise=NOISE,
            terminate=fallen,
        ),
        teaching=Teaching(
            critic_observe=critic_observe,
        ),
        display=Display(
            readout=readout,
            highlight=broken_links,
        ),
        deployment=Deployment(
            on_robot=lambda other: quadruped(name, doc, params, few, hidden=hidden, robot=other),
            hardware=partial(hardware, robot, hidden),
        ),
    )


def hardware(robot: str, hidden: bool) -> Hardware:
    """Say what the robot's drives must be told, and what it needs to reward itself."""
    compiled = compile_spec(go2.model(robot))
    measures = {
        "foot_radius": go2.FOOT,
        "step_height": STEP_HEIGHT,
        "touch": TOUCH,
        "lowest": LOWEST,
    }
    return Hardware(
        **go2.drives(compiled),
        commands=() if hidden else OBSERVATIONS[-3:],
        sensors=LeggedSensors(
            gravity=OBSERVATIONS[:3],
            gyro=OBSERVATIONS[3:6],
            joint_position=OBSERVATIONS[6:18],
            joint_velocity=OBSERVATIONS[18:30],
            joint_torque=tuple(f"{joint}_torque" for joint in go2.JOINTS),
            foot_force={leg: f"{leg}_touch" for leg in go2.LEGS},
        ),
        reward={"kind": "quadruped", "legs": go2.legs(compiled), **measures, "upright": UPRIGHT},
    )


def _build(robot: str, rough: bool, loaded: bool) -> mujoco.MjSpec:
    spec = go2.model(robot)
    if not loaded:
        spec.delete(spec.body("payload"))
    return terrain.lay(spec) if rough else spec


COMMAND_TURN = Param(
    name="command_turn", train=Uniform(-0.6, 0.6), unit="rad/s", doc="rate of turn, left positive"
)

quadruped_flat = quadruped(
    "QuadrupedFlat",
    "Walk and turn as commanded on level ground of unknown friction: horizon 200, 50 Hz.",
    (commanded(0.0, 1.0, 1.3), COMMAND_TURN, FRICTION),
)
quadruped_vel = quadruped(
    "QuadrupedVel",
    "Walk at a speed that only the reward reveals: U[0, 1] m/s, horizon 200, 50 Hz.",
    (commanded(0.0, 1.0, 1.3),),
    hidden=True,
)
quadruped_terrain = quadruped(
    "QuadrupedTerrain",
    "Keep a commanded speed on a slope and rough ground that is felt, not seen: horizon 200, 50 Hz.",
    (commanded(0.4, 0.8, 1.0), FRICTION, SLOPE, *TERRAIN),
)
quadruped_damage = quadruped(
    "QuadrupedDamage",
    "Keep a commanded speed with one or two joints weak, dead or locked: horizon 200, 50 Hz.",
    (commanded(0.4, 0.8, 1.0), *HEALTH),
    (broken(1, 2),),
)
quadruped_mix = quadruped(
    "QuadrupedMix",
    "Keep a commanded speed with everything unknown: ground, load, latency and up to two broken joints.",
    (commanded(0.4, 0.8, 1.0), FRICTION, SLOPE, *TERRAIN, *PAYLOAD, LATENCY, *HEALTH),
    (broken(0, 2),),
)
