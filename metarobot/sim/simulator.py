"""Batched physics behind one protocol: many worlds, each on its own task's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mujoco
from torch import Tensor

WorldSelection = Sequence[int] | Tensor
"""Which worlds: their numbers, or a mask ``(world,)``."""


class Sim(Protocol):
    """Many worlds of the same layout, each with its own model and state; the world axis is axis 0.

    A model has the same layout as another if it differs in numbers alone: the same bodies, joints
    and actuators.
    """

    @property
    def worlds(self) -> int:
        """Number of worlds."""

    def set_models(
        self, models: Sequence[mujoco.MjModel], ids: Sequence[int] | None = None
    ) -> None:
        """Put each world of ``ids`` (default: all) on its model; states stay as they are."""

    def bind(self, field: str) -> Tensor:
        """Return the simulator's own tensor ``(world, ...)`` of an ``MjData`` field.

        Units are MuJoCo's; numbers are float64, on a GPU float32. State fields (qpos, qvel, ctrl,
        ...) are read and written in place; derived ones (xpos, sensordata, ...) lag the state by
        one substep after ``step``.
        """

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Advance worlds (default: all); return ``(world,)``, true where the physics broke down.

        It broke down where the state is not finite, or MuJoCo warned of it or failed.
        """

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Put worlds (default: all) into a fresh state with these joint positions and velocities.

        ``qpos`` and ``qvel`` have a row for each number of ``rows``; with a mask, one for each
        world there is. Sensors of position and velocity are current afterwards.
        """

    def snapshot(self, world: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Return one world's model and a copy of its data, with forward kinematics computed."""
