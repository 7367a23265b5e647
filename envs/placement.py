"""A Panda that has to put things where they belong: one of several classes is presented, each has a
place of its own.

The class is seen, as a code of its colours and texture; where it belongs is hidden, and other for
every task. It is found out by trial, or read off demonstrations: the K-shot object task.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from metarobot.envs.grasp import SIZE
from metarobot.envs.robots import arm_control as manipulation
from metarobot.envs.robots.arm_control import AIM, FORCE, GRIPPED, HAND, REACH, TURN, YAW, scene_of
from metarobot.envs.scenery import graspable_objects as objects
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

HORIZON = 120
"""Control steps an episode."""
CLASSES, KNOWN = 4, 1000
"""Classes of a task, each with a place of its own; and how many there are to train on. As many
others are for tests."""
CODE = 16
"""Length of the code that colours and texture are seen as."""
PLACES = torch.tensor([[0.42, -0.2], [0.62, -0.12], [0.62, 0.12], [0.42, 0.2]]).double()
"""Middles of the places, x and y, m."""
NEAR, SETTLED = 0.04, 5
"""Put down means: within so many metres of a place's middle, let go of, for so many control
steps."""
OBSERVATIONS = (*manipulation.OBSERVATIONS, *(f"code_{i}" for i in range(CODE)))
NOISE = (*manipulation.NOISE, *[0.05] * CODE)
SHOWN = (*manipulation.OBSERVATIONS, "place_x_m", "place_y_m")
WEIGHTS = {"reach": 0.3, "grip": 0.3, "carry": 1.0, "success": 20.0, "wrong": 10.0, "calm": 0.05}

SEEN, AWAY, DONE, WRONG = HAND, HAND + 1, HAND + 2, HAND + 3
"""Of the statistics, after the hand's: control steps put down, whether the object has been carried,
whether it was put down in its place, and in another's."""
STATISTICS_SIZE = HAND + 4
_ORDERS = torch.tensor(list(permutations(range(CLASSES))))


@cache
def codes() -> Tensor:
    """Return the code of every class, ``(2 * KNOWN, CODE)``: unit vectors, drawn once and for
    all.
    """
    draws = np.random.Generator(np.random.PCG64(20)).standard_normal((2 * KNOWN, CODE))
    units: Floats = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    return torch.from_numpy(units)


def belongs(state: WorldState) -> Tensor:
    """Return the middle of the place where the presented object belongs, ``(world, 2)``, m."""
    orders = constant_like(_ORDERS, state.variant)
    return constant_like(PLACES, state.qpos)[orders[state.task["order"].long(), state.variant]]


def code(state: WorldState) -> Tensor:
    """Return the presented object's code, ``(world, CODE)``."""
    named = torch.stack([state.task[f"class_{i}"] for i in range(CLASSES)], 1).long()
    return constant_like(codes(), state.qpos)[
        named.gather(1, state.variant[:, None])[:, 0] + KNOWN * state.task["unseen"].long()
    ]


def observe(state: WorldState) -> Tensor:
    """Return ``(world, 35)``: what a grasping hand sees, and the presented object's code."""
    return torch.cat([manipulation.observe(state), code(state).float()], 1)


def observe_shown(state: WorldState) -> Tensor:
    """Return ``(world, 21)``: what a grasping hand sees, and where the object belongs, from the
    workspace's middle.
    """
    place = belongs(state) - constant_like(manipulation.CENTRE, state.qpos)[:2]
    return torch.cat([manipulation.observe(state), place.float()], 1)


def critic_observe(state: WorldState) -> Tensor:
    """Return the way from the object to its place, and the statistics of the placing."""
    return torch.cat(
        [10 * (belongs(state) - scene_of(state).object[:, :2]), state.statistics[:, HAND:]], 1
    ).float()


def begin(state: WorldState) -> Tensor:
    """Start with an open hand, and nothing placed."""
    return torch.nn.functional.pad(manipulation.begin(state), (0, STATISTICS_SIZE - HAND))


def count(before: WorldState, after: WorldState) -> Tensor:
    """Keep the statistics: see ``SEEN``."""
    old, scene = before.statistics, scene_of(after)
    hand = manipulation.count(before, after, scene)
    gaps = torch.cdist(scene.object[:, :2], constant_like(PLACES, scene.object))
    down = (
        (hand[:, FORCE] == 0)
        & (scene.pads.amax(1) < 0.05)
        & (scene.lift.abs() < 0.01)
        & (gaps.amin(1) < NEAR)
    )
    seen = torch.where(down, old[:, SEEN] + 1, 0.0)
    away = (old[:, AWAY] > 0) | (scene.held & (scene.lift > 0.02))
    settled, right = seen >= SETTLED, (scene.object[:, :2] - belongs(after)).norm(dim=1) < NEAR
    rows = [
        seen,
        away,
        (old[:, DONE] > 0) | (settled & right),
        (old[:, WRONG] > 0) | (settled & ~right),
    ]
    return torch.cat([hand, torch.stack([r.to(hand) for r in rows], 1)], 1)


def reward(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Return named terms in [0, 1], or [−1, 0] for what should not be; ``success`` is 1 once an
    episode.
    """
    scene, statistics = scene_of(after), after.statistics
    gap = (scene.object[:, :2] - belongs(after)).norm(dim=1)
    return {
        "reach": 1 - torch.tanh(8 * scene.offset.norm(dim=1)),
        "grip": statistics[:, GRIPPED] * scene.held,
        "carry": statistics[:, AWAY] * (1 - torch.tanh(5 * gap)),
        "success": statistics[:, DONE] - before.statistics[:, DONE],
        "wrong": before.statistics[:, WRONG] - statistics[:, WRONG],
        "calm": -after.action[:, :4].square().mean(1),
    }


def over(state: WorldState) -> Tensor:
    """Say where the object has been put down, or left the table."""
    scene, statistics = scene_of(state), state.statistics
    low, high = (
        constant_like(x, scene.object)[:2] for x in (manipulation.LOWEST, manipulation.HIGHEST)
    )
    away = ((scene.object[:, :2] < low - 0.1) | (scene.object[:, :2] > high + 0.1)).any(1)
    return (statistics[:, DONE] > 0) | (statistics[:, WRONG] > 0) | away


def readout(before: WorldState, after: WorldState, dt: float) -> dict[str, Tensor]:
    """Show which class is presented and how far it is from its place."""
    gap = (scene_of(after).object[:, :2] - belongs(after)).norm(dim=1)
    return {"class": after.variant + 1.0, "to its place cm": 100 * gap}


def expert(state: WorldState) -> Tensor:
    """Grasp, lift, carry and put down with everything known; actions ``(world, 6)``."""
    scene, statistics = scene_of(state), state.statistics
    closed, away = statistics[:, FORCE] > 0, statistics[:, AWAY] > 0
    rest = scene.rest
    low = (rest - 0.002).clamp_min(0.014)
    goal = belongs(state)
    gap, off = (scene.object[:, :2] - goal).norm(dim=1), scene.offset[:, :2].norm(dim=1)
    there, landed = gap < 0.02, scene.object[:, 2] < rest + 0.005
    # before: over it, down and close; then up, across, down and open; then up again
    carried = closed & scene.held & (statistics[:, GRIPPED] > 0)
    over = torch.where(off < 0.01, low, low + 0.06)
    height = torch.where(closed, torch.where(carried, torch.where(there, low, 0.13), low), over)
    height = torch.where(away & ~closed, 0.16, height)
    # keep clear of the table while it is carried across
    lifted = scene.object[:, 2] > rest + 0.03
    across = torch.where(
        (lifted | there)[:, None], goal - scene.offset[:, :2], statistics[:, AIM][:, :2]
    )
    place = torch.where(
        carried[:, None],
        across,
        torch.where(closed[:, None], statistics[:, AIM][:, :2], scene.object[:, :2]),
    )
    place = torch.where((away & ~closed)[:, None], statistics[:, AIM][:, :2], place)
    move = (torch.cat([place, height[:, None]], 1) - statistics[:, AIM]) / REACH
    y = scene.y[:, :2]
    turn = torch.where(
        closed | away, 0.0, (torch.atan(-y[:, 0] / y[:, 1]) - statistics[:, YAW]) / TURN
    )
    still = scene.speed.norm(dim=1) < 0.08
    ready = (off < 0.006) & ((scene.tip[:, 2] - low).abs() < 0.006) & still & ~away
    release = away & closed & there & landed & still
    close = torch.where((closed & ~release) | ready, 1.0, -1.0)
    force = manipulation.strength(1 + 3 * state.task["mass"] * 9.81 / (2 * state.task["friction"]))
    move = torch.cat([move[:, :2].clamp(-0.6, 0.6), move[:, 2:].clamp(-1.0, 0.5)], 1)
    return torch.cat([move, torch.stack([turn, close, force], 1)], 1).clamp(-1, 1)


def named(i: int) -> Param:
    """Build one of a task's classes; no two of a task are alike."""
    known = tuple(map(float, range(i, KNOWN, CLASSES)))
    return Param(name=f"class_{i}", train=Choice(known), nuisance=True, doc="a class of objects")


UNSEEN = Param(
    name="unseen",
    train=Choice((0.0,)),
    extrapolation=Choice((1.0,)),
    nuisance=True,
    doc="whether all classes are others, that are never trained on",
)


FORM = tuple(replace(p, extrapolation=None) for p in SIZE)
ORDER = Param(
    name="order",
    train=Choice(tuple(map(float, range(len(_ORDERS))))),
    doc="which class belongs where: a permutation",
)
MASS = Param(
    name="mass", train=LogUniform(0.05, 0.3), edits_spec=True, unit="kg", doc="of the object"
)
FRICTION = Param(name="friction", train=LogUniform(0.6, 1.2), edits_spec=True, doc="of the object")
KIND = Param(
    name="kind",
    train=Choice((0.0, 1.0)),
    edits_spec=True,
    doc="shape",
    words=tuple(f"{i} {k}" for i, k in enumerate(objects.KINDS)),
)


def placement(name: str, doc: str, *, shown: bool = False, robot: str = "") -> Family:
    """Build a family; ``shown``: the agent sees where the object belongs, not what it is;
    ``robot``: another arm.
    """
    return Family(
        name=name,
        doc=doc,
        space=TaskSpace(
            name, (*map(named, range(CLASSES)), UNSEEN, ORDER, KIND, *FORM, MASS, FRICTION)
        ),
        horizon=HORIZON,
        substeps=manipulation.SUBSTEPS,
        spec=partial(manipulation.build, robot),
        observations=SHOWN if shown else OBSERVATIONS,
        observe=observe_shown if shown else observe,
        reward=reward,
        weights=WEIGHTS,
        start=manipulation.starter(robot),
        interaction=Interaction(
            edit_spec=objects.shape,
            derive=manipulation.Scene,
            noise=(*manipulation.NOISE, 0.005, 0.005) if shown else NOISE,
            controller=manipulation.CONTROL,
            statistics=EpisodeStatistics(size=STATISTICS_SIZE, begin=begin, update=count),
            variants=CLASSES,
            terminate=over,
        ),
        teaching=Teaching(
            critic_observe=critic_observe,
            expert=expert,
        ),
        display=Display(
            readout=readout,
            view=((0.5, 0.0, 0.15), 0.38),
        ),
        deployment=Deployment(
            on_robot=lambda other: placement(name, doc, shown=shown, robot=other),
        ),
    )


placement_task = placement(
    "Placement",
    "Put each class of objects in its place, which demonstrations show or trials reveal: horizon 120, 25 Hz.",
)
placement_shown = placement(
    "PlacementShown",
    "The same with the right place in view, in the code's stead: what Placement is compared with.",
    shown=True,
)
