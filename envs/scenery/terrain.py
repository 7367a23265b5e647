"""Rough ground as a height field, drawn from a seed.

The same kind, roughness and seed give the same ground on every machine.
"""

from __future__ import annotations

import mujoco
import numpy as np

from metarobot.types import Floats

TERRAIN_KINDS = ("noise", "steps", "waves", "ridges")
"""Names of the kinds of ground; a task's parameter ``terrain`` is an index into them."""
HALF_LENGTH = 6.0
"""Half the length of a side of the square field, m."""
CELLS = 120
"""Cells along a side; each is 0.1 m long."""

_BASE_DEPTH = 0.1
"""Thickness of the ground below its lowest point, m."""
_LEVEL_RADIUS = 0.35
"""Radius around the start within which the ground is level, m."""
_ROUGH_RADIUS = 0.8
"""Radius around the start beyond which the ground is fully rough, m."""


def heights(kind: int, roughness: float, seed: int) -> Floats:
    """Return the heights of the ground, ``(CELLS, CELLS)`` (y, x), m, zero at the middle.

    Args:
        kind: Index into ``TERRAIN_KINDS``.
        roughness: Height from the lowest to the highest point, m.
        seed: What the ground is drawn from.
    """
    rng = np.random.Generator(np.random.PCG64([kind, seed]))
    axis = np.linspace(-HALF_LENGTH, HALF_LENGTH, CELLS)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    draw = _DRAW[TERRAIN_KINDS[kind]]
    ground = draw(rng, x, y)

    # to [0, 1], then to ±roughness / 2
    ground = (ground - ground.min()) / max(float(np.ptp(ground)), 1e-9)
    distance = np.hypot(x, y)
    share = np.clip((distance - _LEVEL_RADIUS) / (_ROUGH_RADIUS - _LEVEL_RADIUS), 0, 1)
    return np.asarray(roughness * share * (ground - 0.5))


def _noise(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw rounded bumps 0.4 m apart with a fine grain."""
    coarse = rng.uniform(-1, 1, (31, 31))

    # bilinear interpolation between the corners of the coarse grid
    position = np.linspace(0, 30, CELLS)
    corner = np.minimum(position.astype(int), 29)
    share = position - corner
    rows = coarse[corner] * (1 - share)[:, None] + coarse[corner + 1] * share[:, None]
    bumps = rows[:, corner] * (1 - share) + rows[:, corner + 1] * share
    return np.asarray(bumps + 0.25 * rng.uniform(-1, 1, x.shape))


def _steps(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw square plateaus of 0.6 m, each with a height of its own."""
    cells = CELLS // 20
    plateaus = rng.uniform(-1, 1, (20, 20))
    return np.asarray(np.kron(plateaus, np.ones((cells, cells))), np.float64)


def _waves(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw two trains of waves across each other."""
    ground = np.zeros_like(x)
    for _ in range(2):
        angle = rng.uniform(0, np.pi)
        phase = rng.uniform(0, 2 * np.pi)
        wavelength = rng.uniform(0.7, 1.5)
        along = x * np.cos(angle) + y * np.sin(angle)
        ground += np.sin(2 * np.pi / wavelength * along + phase)
    return ground


def _ridges(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw kerbs 0.2 m wide and 0.7 m apart, across a random direction."""
    angle = rng.uniform(-0.5, 0.5)
    along = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 0.7)
    return np.asarray((along % 0.7 < 0.2).astype(float))


_DRAW = {"noise": _noise, "steps": _steps, "waves": _waves, "ridges": _ridges}


def add_height_field(spec: mujoco.MjSpec) -> mujoco.MjSpec:
    """Replace a model's level floor by a height field, level until ``set_heights`` is called."""
    size = [HALF_LENGTH, HALF_LENGTH, 1e-3, _BASE_DEPTH]
    spec.add_hfield(name="terrain", size=size, nrow=CELLS, ncol=CELLS)
    floor = spec.geom("floor")
    floor.type = mujoco.mjtGeom.mjGEOM_HFIELD
    floor.hfieldname = "terrain"
    set_heights(spec, np.zeros((CELLS, CELLS)))
    return spec


def set_heights(spec: mujoco.MjSpec, ground: Floats) -> None:
    """Write heights ``(CELLS, CELLS)``, m, into the model's height field."""
    low = float(ground.min())
    high = float(ground.max())

    # MuJoCo scales a field's data to [0, 1], so their range goes into its size
    field = spec.hfield("terrain")
    field.size[2] = max(high - low, 1e-3)
    field.userdata = (ground - low).ravel()
    spec.geom("floor").pos[2] = low
