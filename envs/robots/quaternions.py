"""Quaternions, many at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarobot.types import Floats, constant_like


def rotation(quat: Tensor) -> Tensor:
    """Return the rotation matrices of unit quaternions ``(world, 4)``, w first: ``(world, 3,
    3)``.
    """
    return ((quat[:, :, None] * quat[:, None, :]).flatten(1) @ constant_like(_ROTATION, quat)).view(
        -1, 3, 3
    )


def _quadratic() -> Tensor:
    """Return the matrix ``(16, 9)`` that turns the products of a unit quaternion's elements into a
    rotation's.
    """
    units = [np.outer(a, b) for a in np.eye(4) for b in np.eye(4)]
    w, x, y, z = range(4)

    def product(i: int, j: int) -> Floats:
        return np.array([0.5 * (u[i, j] + u[j, i]) for u in units])

    one = product(w, w) + product(x, x) + product(y, y) + product(z, z)
    rows = [
        *(one - 2 * (product(y, y) + product(z, z)), 2 * (product(x, y) - product(w, z))),
        *(2 * (product(x, z) + product(w, y)), 2 * (product(x, y) + product(w, z))),
        *(one - 2 * (product(x, x) + product(z, z)), 2 * (product(y, z) - product(w, x))),
        *(2 * (product(x, z) - product(w, y)), 2 * (product(y, z) + product(w, x))),
        one - 2 * (product(x, x) + product(y, y)),
    ]
    return torch.from_numpy(np.stack(rows, 1))


_ROTATION = _quadratic()
