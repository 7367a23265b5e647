"""A Panda that has to lift objects of unknown shape, weight and friction, and not to crush them.

The arm is commanded as Franka's is: displacements of the hand 25 times a second, and ``grasp(force)`` of the hand,
which closes at one speed and then presses with the force asked for until it is opened. It observes where the object and
the hand are and what the fingers do; weight, friction and fragility are hidden and size is felt alone.
"""

from __future__ import annotations

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.distributions import Choice, LogUniform, Uniform
from metarobot.env import Control, Family, State, Tally
from metarobot.envs import objects, panda
from metarobot.tasks import Param, TaskSpace
from metarobot.types import Floats

SUBSTEPS, HORIZON, TIMESTEP = 8, 100, 0.005
"""Physics steps of 5 ms a control step; control steps an episode."""
HOLD, LIFT, SLIP = 25, 0.10, 0.005
"""Success: so many control steps (1 s) at least so high (m), moving in the hand by less than so far (m)."""
REACH, TURN = 0.02, 0.12
"""What an action of 1 moves the hand's aim by in a control step: m, and rad about the vertical."""
AHEAD = 0.05
"""How far the aim may be ahead of the hand, m."""
LOWEST, HIGHEST = torch.tensor([0.35, -0.2, 0.013]).double(), torch.tensor([0.65, 0.2, 0.3]).double()
"""The box that the aim stays in, m."""
WEAKEST, STRONGEST = 0.5, 60.0
"""Grip forces that can be asked for, N; the action between is their logarithm."""
APPROACH, OPEN = 0.7, 1.5
"""Force on a finger that closes until it touches, and that opens, N."""
CENTRE = torch.tensor([0.5, 0.0, 0.1]).double()
"""Middle of the workspace, m; positions are observed from it."""
GRAVITY = 9.81

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
WEIGHTS = {
    "reach": 0.5,
    "grip": 0.5,
    "lift": 1.0,
    "hold": 1.0,
    "success": 20.0,
    "crush": 5.0,
    "drop": 5.0,
    "calm": 0.05,
}

FORCE, GRIPPED, HELD, ANCHOR, DONE, CRUSHED, DROPPED = 0, 1, 2, slice(3, 6), 6, 7, 8
TOP, AIM, YAW = 9, slice(10, 13), 13
"""The tally: force asked for (0 open), whether a pad has met something, control steps held, where in the hand the
object was when that began, whether the grasp succeeded, whether the object broke or fell, its highest lift, and where
the hand is to be, m and rad."""
TALLIES = 14


class Scene:
    """What the sensors and joints say, one row a world; lengths in m."""

    def __init__(self, state: State) -> None:
        place, axis, tip, x, y, z, self.speed, self.pads = torch.split(state.sensors, [21, 21, 3, 3, 3, 3, 3, 2], 1)
        self.joints, self.axes, self.tip = place.view(-1, 7, 3), axis.view(-1, 7, 3), tip
        self.hand = torch.stack([x, y, z], 1)
        self.opening, self.closing = state.qpos[:, 7:9].sum(1), state.qvel[:, 7:9].sum(1)
        self.object, self.turned = state.qpos[:, 9:12], rotation(state.qpos[:, 12:16])
        self.offset = self.object - self.tip

    @property
    def within(self) -> Tensor:
        """Where the object is in the hand's frame, ``(world, 3)``."""
        return (self.hand @ self.offset[:, :, None])[:, :, 0]


def rotation(quat: Tensor) -> Tensor:
    """Return the rotation of unit quaternions, ``(world, 3, 3)``: columns are the turned axes."""
    w, x, y, z = quat.unbind(1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, 1).view(-1, 3, 3)


def aim(state: State, action: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the hand is to be after the action: its place ``(world, 3)``, m, and its turn ``(world,)``, rad."""
    tip, tally = state.sensors[:, 42:45], state.tally
    place = tally[:, AIM] + REACH * action[:, :3]
    place = torch.minimum(torch.maximum(place, tip - AHEAD), tip + AHEAD)
    turn = (tally[:, YAW] + TURN * action[:, 3]).clamp(-1.0, 1.0)
    return torch.minimum(torch.maximum(place, LOWEST), HIGHEST), turn


def targets(state: State, action: Tensor, told: Tensor) -> Tensor:
    """Turn the aim of the hand into joint targets, by damped least squares, and the grip into a force, N.

    Damped least squares: Buss (2004), "Introduction to inverse kinematics", eq. 11. The hand is kept pointing down.
    """
    scene = Scene(state)
    place, turn = aim(state, action)
    x, down = scene.hand[:, 0], torch.tensor([0.0, 0.0, -1.0]).double()
    upset = torch.linalg.cross(scene.hand[:, 2], down.expand_as(x))
    upset[:, 2] += turn - torch.atan2(x[:, 1], x[:, 0])
    lever = torch.linalg.cross(scene.axes, scene.tip[:, None] - scene.joints)
    jacobian = torch.cat([lever, scene.axes], 2).transpose(1, 2)
    square = jacobian @ jacobian.transpose(1, 2) + 1e-4 * torch.eye(6).double()
    twist = torch.linalg.solve(square, torch.cat([place - scene.tip, upset], 1)[:, :, None])
    step = (jacobian.transpose(1, 2) @ twist)[:, :, 0].clamp(-2 * _STEP, 2 * _STEP)
    arm = (state.qpos[:, :7] + step).clamp(_LOW, _HIGH)
    asked, gripped = state.tally[:, FORCE], state.tally[:, GRIPPED] > 0
    grip = torch.where(asked > 0, torch.where(gripped, asked, APPROACH), -OPEN)
    return torch.cat([arm, grip[:, None]], 1)


_STEP = torch.from_numpy(panda.SPEED * SUBSTEPS * TIMESTEP)
_LOW, _HIGH = torch.from_numpy(panda.LOW), torch.from_numpy(panda.HIGH)


def rest(qpos: Tensor) -> Tensor:
    """Hold the arm where it starts, the hand open."""
    return torch.cat([qpos[:, :7], torch.full_like(qpos[:, :1], -OPEN)], 1)


def lift(scene: Scene, state: State) -> Tensor:
    """Return how high the object is over where it stood, m."""
    return scene.object[:, 2] - objects.rest(state.task)


def limit(state: State) -> Tensor:
    """Return the grip force that crushes the object, N: a multiple of what just holds it, m·g / 2μ."""
    if "room" not in state.task:
        return torch.full_like(state.qpos[:, 0], torch.inf)
    return state.task["room"] * need(state)


def need(state: State) -> Tensor:
    """Return the grip force that just holds the object, N: two pads, Coulomb's law."""
    return state.task["mass"] * GRAVITY / (2 * state.task["friction"])


def begin(state: State) -> Tensor:
    """Start with the hand open, to stay where it is."""
    tip, x = state.sensors[:, 42:45], state.sensors[:, 45:48]
    tally = torch.zeros(len(tip), TALLIES).double()
    tally[:, AIM], tally[:, YAW] = tip, torch.atan2(x[:, 1], x[:, 0])
    return tally


def count(before: State, after: State) -> Tensor:
    """Keep the tally: see ``FORCE``."""
    old, scene = before.tally, Scene(after)
    close, strength = after.action[:, 4], (after.action[:, 5] + 1) / 2
    asked = WEAKEST * (STRONGEST / WEAKEST) ** strength
    force = torch.where(close > 0.5, torch.where(old[:, FORCE] > 0, old[:, FORCE], asked), old[:, FORCE])
    force = torch.where(close < -0.5, 0.0, force)
    both = (scene.pads > 0.05).all(1)
    gripped = (force > 0) & ((scene.pads > 0.05).any(1) | (old[:, GRIPPED] > 0))
    height = lift(scene, after)
    moved = (scene.within - old[:, ANCHOR]).norm(dim=1)
    up = (height >= LIFT) & gripped & both
    held = torch.where(up & ((old[:, HELD] == 0) | (moved < SLIP)), old[:, HELD] + 1, 0.0)
    anchor = torch.where((held <= 1)[:, None], scene.within, old[:, ANCHOR])
    crushed = (old[:, CRUSHED] > 0) | (scene.pads.amax(1) > limit(after))
    top = torch.maximum(old[:, TOP], height)
    dropped = (old[:, DROPPED] > 0) | ((top > 0.03) & (height < top - 0.03) & ~both)
    done = (old[:, DONE] > 0) | ((held >= HOLD) & ~crushed)
    place, turn = aim(before, after.action)
    rows = [force, gripped, held, *anchor.unbind(1), done, crushed, dropped, top, *place.unbind(1), turn]
    return torch.stack([r.double() for r in rows], 1)


def observe(state: State) -> Tensor:
    """Return ``(world, 19)``."""
    scene = Scene(state)
    turned = torch.cat([scene.turned[:, :, 0], scene.turned[:, :, 2]], 1)
    flags = torch.stack(
        [scene.opening, scene.closing, (state.tally[:, FORCE] > 0).double(), state.tally[:, GRIPPED]], 1
    )
    return torch.cat([scene.tip - CENTRE, scene.speed, scene.offset, turned, flags], 1).float()


def critic_observe(state: State) -> Tensor:
    """Return what the robot cannot feel: the forces, how long the object has been held, and how high it is."""
    scene, tally = Scene(state), state.tally
    rows = [scene.pads / 10, tally[:, [HELD]] / HOLD, tally[:, [DONE, CRUSHED, DROPPED]], 10 * tally[:, [TOP]]]
    return torch.cat([*rows, (tally[:, [FORCE]] + 1).log(), (need(state)[:, None] + 1).log()], 1).float()


def reward(before: State, after: State, dt: float) -> dict[str, Tensor]:
    """Return named terms in [0, 1], or [−1, 0] for what should not be; ``success`` is 1 once an episode."""
    scene, tally = Scene(after), after.tally
    both = tally[:, GRIPPED] * (scene.pads > 0.05).all(1)
    aim = scene.offset.square().sum(1).sqrt()
    return {
        "reach": 1 - torch.tanh(8 * aim),
        "grip": both,
        "lift": both * (lift(scene, after) / LIFT).clamp(0, 1),
        "hold": (tally[:, HELD] / HOLD).clamp_max(1),
        "success": tally[:, DONE] - before.tally[:, DONE],
        "crush": before.tally[:, CRUSHED] - tally[:, CRUSHED],
        "drop": before.tally[:, DROPPED] - tally[:, DROPPED],
        "calm": -after.action[:, :4].square().mean(1),
    }


def over(state: State) -> Tensor:
    """Say where the object broke, fell or left the table, or the hand jams."""
    scene, tally = Scene(state), state.tally
    away = (scene.object[:, :2] - CENTRE[:2]).abs().amax(1) > 0.3
    jammed = scene.pads.amax(1) > 3 * panda.FORCE
    return (tally[:, CRUSHED] > 0) | (tally[:, DROPPED] > 0) | away | jammed


def start(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Hold the hand over the table, joints within ±0.03 rad; put the object within 5 cm and 0.5 rad of its middle."""
    yaw = rng.uniform(-0.5, 0.5)
    place = [CENTRE[0] + rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05), -model.site("bottom").pos[2]]
    arm = panda.READY + rng.uniform(-0.03, 0.03, 7)
    fingers = 2 * [panda.STROKE / 2]
    return np.array([*arm, *fingers, *place, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]), np.zeros(model.nv)


def readout(before: State, after: State, dt: float) -> dict[str, Tensor]:
    """Show the grip force, and how high the object is."""
    scene = Scene(after)
    return {"grip N": scene.pads.amax(1), "lift cm": 100 * lift(scene, after)}


def expert(state: State) -> Tensor:
    """Grasp and lift with everything known: over the object, down, close with twice the force needed, up, hold.

    With a crush limit, with the geometric mean of what holds and what crushes. Returns actions ``(world, 6)``.
    """
    scene, tally = Scene(state), state.tally
    closed, low = tally[:, FORCE] > 0, (objects.rest(state.task) - 0.002).clamp_min(0.014)
    grasped = closed & (scene.pads > 0.05).all(1)
    off = scene.offset[:, :2].norm(dim=1)
    height = torch.where(grasped | (tally[:, TOP] > 0.01), 0.18, torch.where(closed | (off < 0.01), low, low + 0.06))
    place = torch.where(closed[:, None], tally[:, AIM][:, :2], scene.object[:, :2])
    move = (torch.cat([place, height[:, None]], 1) - tally[:, AIM]) / REACH
    # as the object's y axis lies, or against it, whichever is nearer
    y = scene.turned[:, :2, 1]
    turn = torch.atan(-y[:, 0] / y[:, 1]) - tally[:, YAW]
    turn = torch.where(closed, 0.0, turn) / TURN
    ready = (off < 0.003) & ((scene.tip[:, 2] - low).abs() < 0.004) & (scene.speed.norm(dim=1) < 0.02)
    wanted = torch.minimum(2 * need(state), torch.sqrt(need(state) * limit(state)))
    force = torch.log(wanted / WEAKEST) / np.log(STRONGEST / WEAKEST) * 2 - 1
    close = torch.where(closed | ready, 1.0, -1.0)
    move[:, 2].clamp_max_(0.4)
    return torch.cat([move, torch.stack([turn, close, force], 1)], 1).clamp(-1, 1)


SIZE = (
    Param(
        name="width",
        train=Uniform(0.03, 0.064),
        beyond=Uniform(0.022, 0.03),
        shapes=True,
        unit="m",
        doc="across the fingers",
    ),
    Param(name="length", train=Uniform(1.0, 1.5), shapes=True, doc="in widths"),
    Param(name="height", train=Uniform(0.04, 0.08), shapes=True, unit="m", doc="upwards"),
)
SHAPE = (
    Param(
        name="kind",
        train=Choice((0.0, 1.0, 2.0, 3.0)),
        beyond=Choice((4.0, 5.0)),
        shapes=True,
        doc="shape",
        words=tuple(f"{i} {k}" for i, k in enumerate(objects.KINDS)),
    ),
    Param(
        name="shape_seed",
        train=Choice(tuple(map(float, range(1000)))),
        shapes=True,
        nuisance=True,
        doc="draws a superquadric",
    ),
)
CENTRE_OF_MASS = tuple(
    Param(
        name=f"centre_{a}",
        train=Uniform(-0.5, 0.5),
        shapes=True,
        doc=f"how far along {a} a fifth of the mass sits, in half-sizes",
    )
    for a in "xy"
)
ROOM = Param(
    name="room",
    train=Uniform(2.0, 3.0),
    beyond=Uniform(1.7, 2.0),
    doc="grip force that crushes it, in forces that just hold it",
)


def mass(low: float, high: float, beyond: float) -> Param:
    """Build the object's mass."""
    return Param(
        name="mass",
        train=LogUniform(low, high),
        beyond=LogUniform(high, beyond),
        shapes=True,
        unit="kg",
        doc="of the object",
    )


def friction(low: float, high: float, beyond: float) -> Param:
    """Build the friction between the object and what touches it."""
    return Param(
        name="friction", train=LogUniform(low, high), beyond=LogUniform(beyond, low), shapes=True, doc="of the object"
    )


def _build() -> mujoco.MjSpec:
    spec = panda.panda()
    spec.option.timestep, spec.option.integrator = TIMESTEP, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 100.0
    spec.worldbody.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[1, 1, 0.1],
        contype=3,
        conaffinity=2,
        rgba=[0.75, 0.72, 0.68, 1],
    )
    objects.add(spec)
    return panda.equip(spec)


def grasp(name: str, doc: str, params: tuple[Param, ...]) -> Family:
    """Build a family."""
    return Family(
        name=name,
        doc=doc,
        space=TaskSpace(name, params),
        horizon=HORIZON,
        substeps=SUBSTEPS,
        spec=_build,
        shape=objects.shape,
        observations=OBSERVATIONS,
        observe=observe,
        noise=NOISE,
        critic_observe=critic_observe,
        control=Control(actions=ACTIONS, targets=targets, rest=rest),
        tally=Tally(size=TALLIES, begin=begin, count=count),
        reward=reward,
        weights=WEIGHTS,
        start=start,
        terminate=over,
        readout=readout,
        expert=expert,
        view=((0.45, 0.0, 0.17), 0.3),
    )


grasp_shapes = grasp(
    "GraspShapes",
    "Lift objects of unknown shape, size, weight and friction and hold them: horizon 100, 25 Hz.",
    (*SHAPE, *SIZE, mass(0.05, 0.5, 0.8), friction(0.4, 1.2, 0.3)),
)
grasp_fragile = grasp(
    "GraspFragile",
    "Find the grip force between what drops and what crushes a box, each another one: horizon 100, 25 Hz.",
    (*SIZE, mass(0.15, 0.8, 1.0), friction(0.25, 1.0, 0.2), ROOM),
)
grasp_mix = grasp(
    "GraspMix",
    "Lift objects of which nothing is known, shape, weight, balance, friction or fragility: horizon 100, 25 Hz.",
    (*SHAPE, *SIZE, mass(0.1, 0.6, 0.8), friction(0.3, 1.0, 0.25), *CENTRE_OF_MASS, ROOM),
)
