"""Batched physics behind one protocol: many worlds, each on its own task's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mujoco
from torch import Tensor

WorldSelection = Sequence[int] | Tensor
"""Which worlds: their numbers, or a mask ``(world,)``."""


class Sim(Protocol):
    """Many worlds of the same layout, each with its own model and state. The world axis is axis
    0.
    """

    @property
    def worlds(self) -> int:
        """Number of worlds."""

    def set_models(
        self, models: Sequence[mujoco.MjModel], ids: Sequence[int] | None = None
    ) -> None:
        """Put each world of ``ids`` (default: all) on its model; its state is kept until the next
        reset.
        """

    def bind(self, field: str) -> Tensor:
        """Return the live tensor ``(world, ...)`` of an ``MjData`` field in MuJoCo's units:
        float64, on a GPU float32.

        State fields (qpos, qvel, ctrl, ...) are read and written in place; derived ones (xpos,
        sensordata, ...) lag the state by one substep after ``step``.
        """

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Advance worlds (default: all); return ``(world,)``, true where the physics broke down.

        NaN, a warning of MuJoCo's, or an error.
        """

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Put worlds (default: all) into a fresh state with these joint positions and velocities.

        A row for each number; with a mask, a row for each world there is.
        """

    def snapshot(self, world: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Return one world's model and a copy of its data, forward kinematics computed: for
        pictures.
        """
