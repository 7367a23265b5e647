"""Things to grasp: one free body whose shape, size, mass and friction are numbers of the task."""

from __future__ import annotations

from collections.abc import Mapping

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.tasks.distributions import TaskError
from metarobot.types import Floats

KINDS = ("box", "cylinder", "sphere", "ellipsoid", "capsule", "superquadric")
"""What a shape's number stands for."""
POINTS = 60
"""Corners of a superquadric: every mesh has as many, so that models of all objects are of one
size."""
COLOURS = (
    (0.85, 0.35, 0.25),
    (0.25, 0.55, 0.8),
    (0.95, 0.75, 0.25),
    (0.4, 0.7, 0.4),
    (0.65, 0.45, 0.75),
    (0.9, 0.5, 0.65),
)
"""Of each kind."""
_MESH = "superquadric"


def superquadric(seed: int) -> Floats:
    """Return the corners ``(POINTS, 3)`` of a convex body in the cube ±1, drawn from a seed.

    The surface |x|^p + |y|^p ... of Barr (1981): round to boxy by two exponents, its points spread
    evenly and jittered. Strictly convex, so that every point is a corner and every face a triangle.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    flat, round_ = rng.uniform(0.45, 1.0, 2)
    i = np.arange(POINTS) + 0.5
    height = 0.87 * (1 - 2 * i / POINTS)
    around = np.pi * (1 + 5**0.5) * i + rng.uniform(0, 2 * np.pi)
    # three points each to lie on, so that it stands
    height[:3], height[-3:] = 0.9, -0.9
    around[:3] = around[-3:] = around[0] + 2 * np.pi / 3 * np.arange(3)
    up = np.arcsin(height)
    points = np.stack(
        [
            _power(np.cos(up), flat) * _power(np.cos(around), round_),
            _power(np.cos(up), flat) * _power(np.sin(around), round_),
            _power(np.sin(up), flat),
        ],
        1,
    )
    return np.asarray(points / np.abs(points).max(0))


def _power(x: Floats, exponent: float) -> Floats:
    return np.asarray(np.sign(x) * np.abs(x) ** exponent)


def rest(task: Mapping[str, Tensor]) -> Tensor:
    """Return how high over the table the middle of an object lies that stands on it, m."""
    half, height = task["width"] / 2, task["height"] / 2
    kind = task.get("kind", torch.zeros_like(half))
    round_ = (kind == KINDS.index("sphere")) | (kind == KINDS.index("capsule"))
    flat = torch.where(kind == KINDS.index("ellipsoid"), torch.minimum(height, 0.9 * half), height)
    return torch.where(round_, half, flat)


def _aside(share: float) -> float:
    """Keep off the very middle: MuJoCo lays out its data otherwise for bodies that are symmetric
    all round.
    """
    return share if abs(share) > 0.01 else 0.01


def add(spec: mujoco.MjSpec) -> None:
    """Put the object into the world; ``shape`` gives it its form."""
    body = spec.worldbody.add_body(name="object", pos=[0.5, 0, 0.03])
    body.add_freejoint(name="object")
    mesh = spec.add_mesh(name=_MESH, uservert=superquadric(0).ravel())
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_CONVEX
    # it rolls and turns against some resistance, as things do; and its friction is what counts
    body.add_geom(
        name="object", size=[0.02, 0.02, 0.02], condim=6, contype=1, conaffinity=2, priority=1
    )
    body.add_geom(
        name="ballast", size=[0.002, 0, 0], contype=0, conaffinity=0, mass=0.01, rgba=[0, 0, 0, 0]
    )
    body.add_site(name="bottom", pos=[0, 0, -0.02], size=[0.001, 0, 0], rgba=[0, 0, 0, 0])


def shape(spec: mujoco.MjSpec, task: Mapping[str, float]) -> None:
    """Write the task's object into the model.

    ``width`` is across the hand's closing direction (y), ``length`` along x in widths, ``height``
    up, m; a sphere and a capsule are as high as wide, an ellipsoid lies flat.
    """
    kind, seed = KINDS[int(task.get("kind", 0))], int(task.get("shape_seed", 0))
    for name in ("width", "length", "height", "mass", "friction"):
        if not 0 < task[name] < np.inf:
            raise TaskError(f"an object's {name} must be a positive number, not {task[name]:g}")
    half, long = task["width"] / 2, task["width"] / 2 * task["length"]
    height = float(rest({k: torch.tensor(v).double() for k, v in task.items()}))
    geom = spec.geom("object")
    geom.quat, geom.meshname = [1, 0, 0, 0], ""
    types = mujoco.mjtGeom
    if kind == "box":
        geom.type, geom.size = types.mjGEOM_BOX, [long, half, height]
    elif kind == "cylinder":
        geom.type, geom.size = types.mjGEOM_CYLINDER, [half, height, 0]
    elif kind == "sphere":
        geom.type, geom.size = types.mjGEOM_SPHERE, [half, 0, 0]
    elif kind == "ellipsoid":
        geom.type, geom.size = types.mjGEOM_ELLIPSOID, [long, half, height]
    elif kind == "capsule":
        # lying along x
        geom.type, geom.size = types.mjGEOM_CAPSULE, [half, long, 0]
        geom.quat = [np.sqrt(0.5), 0, np.sqrt(0.5), 0]
    else:
        geom.type, geom.meshname = types.mjGEOM_MESH, _MESH
    spec.mesh(_MESH).uservert = (superquadric(seed) * [long, half, height]).ravel()
    ballast = 0.2 if "centre_x" in task else 0.02
    geom.mass, spec.geom("ballast").mass = (1 - ballast) * task["mass"], ballast * task["mass"]
    spec.geom("ballast").pos = [
        _aside(task.get("centre_x", 0)) * long,
        _aside(task.get("centre_y", 0)) * half,
        0,
    ]
    geom.friction = [task["friction"], 0.005, 0.0005]
    geom.rgba = [*COLOURS[KINDS.index(kind)], 1]
    spec.site("bottom").pos = [0, 0, -height]
