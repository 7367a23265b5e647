"""What the tests of the arm share: easy objects, programs for the hand, and measurements."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.envs.robots.arm_control import ArmState
from metarobot.tasks.family import Family, families

NAMES = ["GraspFragile", "GraspMix", "GraspShapes"]
SHAPES, FRAGILE = families.get("GraspShapes"), families.get("GraspFragile")
LOOSE = SHAPES.replace(terminate=None)
BOX = {
    "kind": 0.0,
    "shape_seed": 0.0,
    "width": 0.05,
    "length": 1.2,
    "height": 0.06,
    "mass": 0.3,
    "friction": 0.8,
}
FORCES = 0.5, 60.0
"""The weakest and the strongest grip that can be asked for, N."""
CLOSE, STRENGTH = 4, 5
"""Of the action."""
PADS = slice(57, 59)
"""Of the sensors: the force on each pad, N."""


def strength(force: Tensor) -> Tensor:
    """The element of the action that asks for a grip force, N."""
    return (2 * torch.log(force / FORCES[0]) / np.log(FORCES[1] / FORCES[0]) - 1).float()


def wild(env: Env, rng: torch.Generator) -> Tensor:
    return 2 * torch.rand(env.worlds, env.act_dim, generator=rng) - 1


def clever(env: Env) -> Tensor:
    return env.family.teaching.expert(env.state).float()


def need(env: Env) -> Tensor:
    """The force that just holds each object: two pads, Coulomb's law."""
    return env.task_values["mass"] * 9.81 / (2 * env.task_values["friction"])


def up(env: Env) -> Tensor:
    """How high each object is over where it stood, m; for objects that have not toppled."""
    bottom = torch.tensor([-env.model(t).site("bottom").pos[2] for t in env.tasks])
    return env.state.qpos[:, -5] - bottom


def tilt(env: Env) -> Tensor:
    """Between each hand's axis and straight down, degrees."""
    return torch.rad2deg(torch.arccos((-ArmState(env.state).hand_axes[:, 2, 2]).clamp(-1, 1)))


def small(family: Family, worlds: int, seed: int = 0, **changes: Any) -> Env:
    return Env(family.replace(**changes), family.space.sample("train", worlds, seed), threads=1)


each_family = pytest.mark.parametrize("family", [SHAPES, FRAGILE], ids=lambda f: f.name)
