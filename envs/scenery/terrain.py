"""Rough ground as a height field, drawn from a seed: the same numbers give the same ground on every
machine.
"""

from __future__ import annotations

import mujoco
import numpy as np

from metarobot.types import Floats

KINDS = ("noise", "steps", "waves", "ridges")
"""What a terrain's number stands for."""
RADIUS, CELLS = 6.0, 120
"""Half the length of the square field, m, and its cells a side: 0.1 m each."""
_DEPTH, _CLEARING = 0.1, (0.35, 0.8)
"""Ground below the lowest point, m; level within the first radius round the start, all rough beyond
the second."""


def heights(kind: int, roughness: float, seed: int) -> Floats:
    """Return the heights ``(CELLS, CELLS)`` (y, x), m, zero at the middle.

    ``roughness`` is from the lowest to the highest point, m.
    """
    rng = np.random.Generator(np.random.PCG64([kind, seed]))
    y, x = np.meshgrid(*2 * [np.linspace(-RADIUS, RADIUS, CELLS)], indexing="ij")
    draw = {"noise": _noise, "steps": _steps, "waves": _waves, "ridges": _ridges}[KINDS[kind]]
    ground = draw(rng, x, y)
    ground = (ground - ground.min()) / max(float(np.ptp(ground)), 1e-9)
    inner, outer = _CLEARING
    share = np.clip((np.hypot(x, y) - inner) / (outer - inner), 0, 1)
    return np.asarray(roughness * share * (ground - 0.5))


def _noise(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw bumps 0.4 m apart, rounded, with a fine grain."""
    coarse = rng.uniform(-1, 1, (31, 31))
    at = np.linspace(0, 30, CELLS)
    low = np.minimum(at.astype(int), 29)
    share = at - low
    rows = coarse[low] * (1 - share)[:, None] + coarse[low + 1] * share[:, None]
    bumps = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    return np.asarray(bumps + 0.25 * rng.uniform(-1, 1, x.shape))


def _steps(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw square plateaus of 0.6 m, each at a height of its own."""
    size = CELLS // 20
    return np.asarray(np.kron(rng.uniform(-1, 1, (20, 20)), np.ones((size, size))), np.float64)


def _waves(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw two trains of waves across each other."""
    ground = np.zeros_like(x)
    for _ in range(2):
        angle, phase, length = (
            rng.uniform(0, np.pi),
            rng.uniform(0, 2 * np.pi),
            rng.uniform(0.7, 1.5),
        )
        ground += np.sin(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return ground


def _ridges(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Draw kerbs 0.2 m wide, 0.7 m apart, across a random direction."""
    angle = rng.uniform(-0.5, 0.5)
    return np.asarray(
        ((x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 0.7)) % 0.7 < 0.2).astype(float)
    )


def lay(spec: mujoco.MjSpec) -> mujoco.MjSpec:
    """Turn the level floor of a model into a height field, level until ``shape`` is called."""
    spec.add_hfield(name="terrain", size=[RADIUS, RADIUS, 1e-3, _DEPTH], nrow=CELLS, ncol=CELLS)
    floor = spec.geom("floor")
    floor.type, floor.hfieldname = mujoco.mjtGeom.mjGEOM_HFIELD, "terrain"
    shape(spec, np.zeros((CELLS, CELLS)))
    return spec


def shape(spec: mujoco.MjSpec, ground: Floats) -> None:
    """Write heights into the model. MuJoCo scales a field's data to [0, 1], so their range goes
    into its size.
    """
    low, high = float(ground.min()), float(ground.max())
    field = spec.hfield("terrain")
    field.size[2] = max(high - low, 1e-3)
    field.userdata = (ground - low).ravel()
    spec.geom("floor").pos[2] = low
