"""The CPU backend: ``mujoco.batch.Batch``, worlds spread over native threads, bit-identical to a
serial loop.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import mujoco
import numpy as np
import torch
from mujoco import batch
from torch import Tensor

from metarobot.sim.protocol import WorldSelection


class CpuSim:
    """Worlds in a ``mujoco.batch.Batch``; tensors are views of its memory, nothing is copied."""

    def __init__(self, models: Sequence[mujoco.MjModel], threads: int = 0) -> None:
        self._batch = batch.Batch(models[0], len(models), threads or len(os.sched_getaffinity(0)))
        self._models = list(models)
        self._batch.set_models(self._models)
        self._qpos, self._qvel = self.bind("qpos"), self.bind("qvel")
        mujoco.set_mju_user_warning(
            lambda _: None
        )  # warnings are counted by world; no MUJOCO_LOG.TXT

    @property
    def worlds(self) -> int:
        """Number of worlds."""
        return len(self._models)

    def set_models(
        self, models: Sequence[mujoco.MjModel], ids: Sequence[int] | None = None
    ) -> None:
        """Put each world of ``ids`` (default: all) on its model."""
        for i, model in zip(range(self.worlds) if ids is None else ids, models, strict=True):
            self._models[i] = model
        self._batch.set_models(self._models)

    def bind(self, field: str) -> Tensor:
        """Return the live tensor ``(world, ...)`` of an ``MjData`` field."""
        array = self._batch.bind(field)
        array.flags.writeable = (
            True  # derived fields are read-only to numpy; torch warns about that
        )
        return torch.from_numpy(array)

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Advance worlds (default: all); return ``(world,)``, true where the physics broke down."""
        failed: np.ndarray | None = None
        try:
            self._batch.step(selected_ids(rows), nstep=substeps)
        except batch.SimulationError as e:
            failed = e.ids
        bad = torch.from_numpy(self._batch.warning[:, :, 1].any(1))
        bad |= ~torch.isfinite(self._qpos.sum(1) + self._qvel.sum(1))
        if failed is not None:
            bad[torch.from_numpy(failed)] = True
        return bad

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Put worlds (default: all) into a fresh state: warnings cleared, sensors of place and
        motion current.
        """
        ids = selected_ids(rows)
        if isinstance(rows, Tensor):
            qpos, qvel = qpos[rows], qvel[rows]
        self._batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        where = slice(None) if ids is None else torch.as_tensor(ids)
        self._qpos[where], self._qvel[where] = qpos, qvel
        if self._models[0].nsensordata:
            self._batch.forward(ids, stage=mujoco.mjtStage.mjSTAGE_VEL.value)

    def snapshot(self, world: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Return one world's model and a copy of its data, forward kinematics computed."""
        model, data = self._models[world], self._batch.get_data(world)
        mujoco.mj_forward(model, data)
        return model, data


def selected_ids(rows: WorldSelection | None) -> Sequence[int] | None:
    """List the numbers of worlds; None is all of them."""
    return torch.nonzero(rows)[:, 0].tolist() if isinstance(rows, Tensor) else rows
