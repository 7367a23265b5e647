"""A Panda that has to lift objects of unknown shape, weight and friction, and not to crush them.

It observes where the object and the hand are and what the fingers do; weight, friction and
fragility are hidden and size is felt alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from metarobot.envs.robots import arm_control as manipulation
from metarobot.envs.robots import panda
from metarobot.envs.robots.arm_control import AIM, FORCE, GRIPPED, HAND, REACH, TURN, YAW, scene_of
from metarobot.envs.scenery import graspable_objects as objects
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

HORIZON = 100
"""Control steps an episode."""
HOLD, LIFT, SLIP = 25, 0.10, 0.005
"""Success: so many control steps (1 s) at least so high (m), moving in the hand by less than so far
(m)."""
GRAVITY = 9.81
WEIGHTS = {
    "reach": 0.5,
    "grip": 0.5,
    "lift": 1.0,
    "hold": 1.0,
    "success": 20.0,
    "crush": 5.0,
    "drop": 5.0,
    "calm": 0.05,
    "effort": 0.3,
}

HELD, ANCHOR, DONE, CRUSHED, DROPPED, TOP = (
    HAND,
    slice(HAND + 1, HAND + 4),
    HAND + 4,
    HAND + 5,
    HAND + 6,
    HAND + 7,
)
"""Of the statistics, after the hand's: control steps held, where in the hand the object was when
that began, whether the grasp succeeded, whether the object broke or fell, and its highest lift,
m."""
STATISTICS_SIZE = HAND + 8


def limit(state: WorldState) -> Tensor:
    """Return the grip force that crushes the object, N: a multiple of what just holds it, m·g /
    2μ.
    """
    if "room" not in state.task:
        return torch.full_like(state.qpos[:, 0], torch.inf)
    return state.task["room"] * need(state)


def need(state: WorldState) -> Tensor:
    """Return the grip force that just holds the object, N: two pads, Coulomb's law."""
    return state.task["mass"] * GRAVITY / (2 * state.task["friction"])


def begin(state: WorldState) -> Tensor:
    """Start with an open hand, and nothing lifted."""
    return torch.nn.functional.pad(manipulation.begin(state), (0, STATISTICS_SIZE - HAND))


def count(before: WorldState, after: WorldState) -> Tensor:
    """Keep the statistics: see ``HELD``."""
    old, scene = before.statistics, scene_of(after)
    hand = manipulation.count(before, after, scene)
    moved = (scene.within - old[:, ANCHOR]).norm(dim=1)
    up = (scene.lift >= LIFT) & (hand[:, GRIPPED] > 0) & scene.held
    held = torch.where(up & ((old[:, HELD] == 0) | (moved < SLIP)), old[:, HELD] + 1, 0.0)
    anchor = torch.where((held <= 1)[:, None], scene.within, old[:, ANCHOR])
    crushed = (old[:, CRUSHED] > 0) | (scene.pads.amax(1) > limit(after))
    top = torch.maximum(old[:, TOP], scene.lift)
    dropped = (old[:, DROPPED] > 0) | ((top > 0.03) & (scene.lift < top - 0.03) & ~scene.held)
    done = (old[:, DONE] > 0) | ((held >= HOLD) & ~crushed)
    rows = [held, *anchor.unbind(1), done, crushed, dropped, top]
    return torch.cat([hand, torch.stack([r.to(hand) for r in rows], 1)], 1)


def critic_observe(state: WorldState) -> Tensor:
    """Return what the robot cannot feel: the forces, how long the object has been held, and how
    high it is.
    """
    scene, statistics = scene_of(state), state.statistics
    rows = [
        scene.pads / 10,
        statistics[:, [HELD]] / HOLD,
        statistics[:, [DONE, CRUSHED, DROPPED]],
        10 * statistics[:, [TOP]],
    ]
    return torch.cat(
        [*rows, (statistics[:, [FORCE]] + 1).log(), (need(state)[:, None] + 1).log()], 1
    ).float()


def reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return named terms in [0, 1], or [−1, 0] for what should not be; ``success`` is 1 once an
    episode.
    """
    scene, statistics = scene_of(after), after.statistics
    both = statistics[:, GRIPPED] * scene.held
    aim = scene.offset.square().sum(1).sqrt()
    return {
        "reach": 1 - torch.tanh(8 * aim),
        "grip": both,
        "lift": both * (scene.lift / LIFT).clamp(0, 1),
        "hold": (statistics[:, HELD] / HOLD).clamp_max(1),
        "success": statistics[:, DONE] - before.statistics[:, DONE],
        "crush": before.statistics[:, CRUSHED] - statistics[:, CRUSHED],
        "drop": before.statistics[:, DROPPED] - statistics[:, DROPPED],
        "calm": -after.action[:, :4].square().mean(1),
        "effort": -statistics[:, GRIPPED] * statistics[:, FORCE] / manipulation.STRONGEST,
    }


def over(state: WorldState) -> Tensor:
    """Say where the object broke, fell or left the table, or the hand jams."""
    scene, statistics = scene_of(state), state.statistics
    away = (scene.object[:, :2] - constant_like(manipulation.CENTRE, scene.object)[:2]).abs().amax(
        1
    ) > 0.3
    jammed = scene.pads.amax(1) > 3 * panda.FORCE
    return (statistics[:, CRUSHED] > 0) | (statistics[:, DROPPED] > 0) | away | jammed


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show the grip force, and how high the object is."""
    scene = scene_of(after)
    return {"grip N": scene.pads.amax(1), "lift cm": 100 * scene.lift}


def expert(state: WorldState) -> Tensor:
    """Grasp and lift with everything known: over the object, down, close with twice the force
    needed, up, hold.

    With a crush limit, with the geometric mean of what holds and what crushes. Returns actions
    ``(world, 6)``.
    """
    scene, statistics = scene_of(state), state.statistics
    closed, low = statistics[:, FORCE] > 0, (scene.rest - 0.002).clamp_min(0.014)
    grasped = closed & scene.held
    off = scene.offset[:, :2].norm(dim=1)
    height = torch.where(
        grasped | (statistics[:, TOP] > 0.01),
        0.18,
        torch.where(closed | (off < 0.01), low, low + 0.06),
    )
    place = torch.where(closed[:, None], statistics[:, AIM][:, :2], scene.object[:, :2])
    move = (torch.cat([place, height[:, None]], 1) - statistics[:, AIM]) / REACH
    # as the object's y axis lies, or against it, whichever is nearer
    y = scene.y[:, :2]
    turn = torch.atan(-y[:, 0] / y[:, 1]) - statistics[:, YAW]
    turn = torch.where(closed, 0.0, turn) / TURN
    ready = (
        (off < 0.003) & ((scene.tip[:, 2] - low).abs() < 0.004) & (scene.speed.norm(dim=1) < 0.02)
    )
    wanted = torch.minimum(2 * need(state), torch.sqrt(need(state) * limit(state)))
    force = manipulation.strength(wanted)
    close = torch.where(closed | ready, 1.0, -1.0)
    move[:, 2].clamp_max_(0.4)
    return torch.cat([move, torch.stack([turn, close, force], 1)], 1).clamp(-1, 1)


def advise(state: WorldState) -> Tensor:
    """Say which force to ask for, and how to lift once that is done; how to get there is not said.
    ``(world, 6)``.
    """
    action, reaching = expert(state), state.statistics[:, FORCE] == 0
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
        words=tuple(f"{i} {k}" for i, k in enumerate(objects.KINDS)),
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
ROOM = Param(
    name="room",
    train=Uniform(2.0, 3.0),
    extrapolation=Uniform(1.7, 2.0),
    doc="grip force that crushes it, in forces that just hold it",
)


def mass(low: float, high: float, beyond: float) -> Param:
    """Build the object's mass."""
    return Param(
        name="mass",
        train=LogUniform(low, high),
        extrapolation=LogUniform(high, beyond),
        edits_spec=True,
        unit="kg",
        doc="of the object",
    )


def friction(low: float, high: float, beyond: float) -> Param:
    """Build the friction between the object and what touches it."""
    return Param(
        name="friction",
        train=LogUniform(low, high),
        extrapolation=LogUniform(beyond, low),
        edits_spec=True,
        doc="of the object",
    )


def grasp(name: str, doc: str, params: tuple[Param, ...], *, robot: str = "") -> Family:
    """Build a family; ``robot`` is another model of its arm."""
    return Family(
        name=name,
        doc=doc,
        space=TaskSpace(name, params),
        horizon=HORIZON,
        substeps=manipulation.SUBSTEPS,
        spec=partial(manipulation.build, robot),
        observations=manipulation.OBSERVATIONS,
        observe=manipulation.observe,
        reward=reward,
        weights=WEIGHTS,
        start=manipulation.starter(robot),
        interaction=Interaction(
            edit_spec=objects.shape,
            derive=manipulation.Scene,
            noise=manipulation.NOISE,
            controller=manipulation.CONTROL,
            statistics=EpisodeStatistics(size=STATISTICS_SIZE, begin=begin, update=count),
            terminate=over,
        ),
        teaching=Teaching(
            critic_observe=critic_observe,
            expert=expert,
            teacher_action=advise,
        ),
        display=Display(
            readout=readout,
            view=((0.5, 0.0, 0.17), 0.3),
        ),
        deployment=Deployment(
            on_robot=lambda other: grasp(name, doc, params, robot=other),
        ),
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
