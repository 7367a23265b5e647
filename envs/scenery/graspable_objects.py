"""Objects to grasp: one free body whose shape, size, mass and friction are task parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from metarobot.lazy import lazy_module
from metarobot.tasks.distributions import TaskError
from metarobot.types import Floats

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

OBJECT_KINDS = ("box", "cylinder", "sphere", "ellipsoid", "capsule", "superquadric")
"""Names of the shapes; a task's parameter ``kind`` is an index into them."""
SUPERQUADRIC_VERTICES = 60
"""Vertices of every superquadric: the compiled models of all objects have the same size."""
KIND_COLOURS = (
    (0.85, 0.35, 0.25),
    (0.25, 0.55, 0.8),
    (0.95, 0.75, 0.25),
    (0.4, 0.7, 0.4),
    (0.65, 0.45, 0.75),
    (0.9, 0.5, 0.65),
)
"""Colour of each kind, RGB."""

_MESH = "superquadric"
_SPHERE = OBJECT_KINDS.index("sphere")
_ELLIPSOID = OBJECT_KINDS.index("ellipsoid")
_CAPSULE = OBJECT_KINDS.index("capsule")
_POSITIVE = ("width", "length", "height", "mass", "friction")
"""Task parameters that must be positive."""


def superquadric(seed: int) -> Floats:
    """Draw the vertices of a convex body in the cube ±1, ``(SUPERQUADRIC_VERTICES, 3)``.

    The surface |x|^p + |y|^p ... of Barr (1981), "Superquadrics and angle-preserving
    transformations": round to boxy by two exponents, with jittered vertices spread evenly over it.
    It is strictly convex, so that every vertex is a corner and every face a triangle.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    vertical_exponent, horizontal_exponent = rng.uniform(0.45, 1.0, 2)

    # a spiral by the golden angle spreads the vertices evenly
    i = np.arange(SUPERQUADRIC_VERTICES) + 0.5
    height = 0.87 * (1 - 2 * i / SUPERQUADRIC_VERTICES)
    longitude = np.pi * (1 + 5**0.5) * i + rng.uniform(0, 2 * np.pi)

    # three vertices at the top and three at the bottom to lie on, so that the object stands
    height[:3] = 0.9
    height[-3:] = -0.9
    triangle = longitude[0] + 2 * np.pi / 3 * np.arange(3)
    longitude[:3] = triangle
    longitude[-3:] = triangle

    latitude = np.arcsin(height)
    horizontal = _signed_power(np.cos(latitude), vertical_exponent)
    x = horizontal * _signed_power(np.cos(longitude), horizontal_exponent)
    y = horizontal * _signed_power(np.sin(longitude), horizontal_exponent)
    z = _signed_power(np.sin(latitude), vertical_exponent)
    vertices = np.stack([x, y, z], 1)
    return np.asarray(vertices / np.abs(vertices).max(0))


def _signed_power(x: Floats, exponent: float) -> Floats:
    return np.asarray(np.sign(x) * np.abs(x) ** exponent)


def resting_height(task: Mapping[str, Tensor]) -> Tensor:
    """Return the height of a standing object's centre over the table, m, ``(world,)``."""
    half_width = task["width"] / 2
    half_height = task["height"] / 2
    kind = task.get("kind", torch.zeros_like(half_width))

    # spheres and capsules are as high as wide; an ellipsoid lies flat, or it would roll away
    is_round = (kind == _SPHERE) | (kind == _CAPSULE)
    flat = torch.minimum(half_height, 0.9 * half_width)
    upright = torch.where(kind == _ELLIPSOID, flat, half_height)
    return torch.where(is_round, half_width, upright)


def add_object(spec: mujoco.MjSpec) -> None:
    """Add the object to the world; ``edit_object`` gives it its shape."""
    body = spec.worldbody.add_body(name="object", pos=[0.5, 0, 0.03])
    body.add_freejoint(name="object")
    mesh = spec.add_mesh(name=_MESH, uservert=superquadric(0).ravel())
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_CONVEX

    # condim 6: it rolls and spins against some resistance, as real objects do;
    # priority 1: the object's friction counts, not the larger of the two
    body.add_geom(
        name="object", size=[0.02, 0.02, 0.02], condim=6, contype=1, conaffinity=2, priority=1
    )
    # a small mass that moves the centre of mass off the middle
    body.add_geom(
        name="ballast", size=[0.002, 0, 0], contype=0, conaffinity=0, mass=0.01, rgba=[0, 0, 0, 0]
    )
    body.add_site(name="bottom", pos=[0, 0, -0.02], size=[0.001, 0, 0], rgba=[0, 0, 0, 0])


def edit_object(spec: mujoco.MjSpec, task: Mapping[str, float]) -> None:
    """Write a task's object into the model.

    ``width`` is across the gripper's closing direction (y), m; ``length`` along x, in widths;
    ``height`` up, m. A sphere and a capsule are as high as wide, and an ellipsoid lies flat.

    Raises:
        TaskError: A size, the mass or the friction is not a positive finite number.
    """
    for name in _POSITIVE:
        if not 0 < task[name] < np.inf:
            raise TaskError(f"an object's {name} must be a positive number, not {task[name]:g}")
    kind = int(task.get("kind", 0))
    half_width = task["width"] / 2
    half_length = task["width"] / 2 * task["length"]
    tensors = {name: torch.tensor(value).double() for name, value in task.items()}
    half_height = float(resting_height(tensors))

    geom = spec.geom("object")
    geom.quat = [1, 0, 0, 0]
    geom.meshname = ""
    match OBJECT_KINDS[kind]:
        case "box":
            geom.type = mujoco.mjtGeom.mjGEOM_BOX
            geom.size = [half_length, half_width, half_height]
        case "cylinder":
            geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
            geom.size = [half_width, half_height, 0]
        case "sphere":
            geom.type = mujoco.mjtGeom.mjGEOM_SPHERE
            geom.size = [half_width, 0, 0]
        case "ellipsoid":
            geom.type = mujoco.mjtGeom.mjGEOM_ELLIPSOID
            geom.size = [half_length, half_width, half_height]
        case "capsule":
            # lying along x
            geom.type = mujoco.mjtGeom.mjGEOM_CAPSULE
            geom.size = [half_width, half_length, 0]
            geom.quat = [np.sqrt(0.5), 0, np.sqrt(0.5), 0]
        case "superquadric":
            geom.type = mujoco.mjtGeom.mjGEOM_MESH
            geom.meshname = _MESH

    # the mesh is written whatever the kind, so that nothing of an earlier task remains
    vertices = superquadric(int(task.get("shape_seed", 0)))
    spec.mesh(_MESH).uservert = (vertices * [half_length, half_width, half_height]).ravel()

    ballast = spec.geom("ballast")
    ballast_share = 0.2 if "centre_x" in task else 0.02
    geom.mass = (1 - ballast_share) * task["mass"]
    ballast.mass = ballast_share * task["mass"]
    ballast_x = _off_centre(task.get("centre_x", 0)) * half_length
    ballast_y = _off_centre(task.get("centre_y", 0)) * half_width
    ballast.pos = [ballast_x, ballast_y, 0]

    geom.friction = [task["friction"], 0.005, 0.0005]
    geom.rgba = [*KIND_COLOURS[kind], 1]
    spec.site("bottom").pos = [0, 0, -half_height]


def _off_centre(share: float) -> float:
    """Keep the ballast off the exact centre.

    MuJoCo lays out its data differently for bodies that are symmetric in all axes.
    """
    return share if abs(share) > 0.01 else 0.01
