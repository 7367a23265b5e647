"""Physics on the CPU: ``mujoco.batch.Batch``, bit-identical to a serial loop over the worlds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import mujoco
import numpy as np
import torch
from mujoco import batch
from torch import Tensor

from metarobot.sim.simulator import WorldSelection


class CpuSim:
    """Worlds in a ``mujoco.batch.Batch``, spread over native threads.

    Tensors are views of its memory: nothing is copied.

    Args:
        models: One model a world.
        threads: Threads of the physics; 0 takes as many as this process may run on.
    """

    def __init__(self, models: Sequence[mujoco.MjModel], threads: int = 0) -> None:
        self._batch = batch.Batch(models[0], len(models), threads or len(os.sched_getaffinity(0)))
        self._models = list(models)
        self._batch.set_models(self._models)
        self._qpos = self.bind("qpos")
        self._qvel = self.bind("qvel")
        # Warnings are counted for each world, so MuJoCo need not write them to MUJOCO_LOG.TXT.
        mujoco.set_mju_user_warning(lambda _: None)

    @property
    def worlds(self) -> int:
        """Number of worlds."""
        return len(self._models)

    def set_models(
        self, models: Sequence[mujoco.MjModel], ids: Sequence[int] | None = None
    ) -> None:
        """Put each world of ``ids`` (default: all) on its model."""
        worlds = range(self.worlds) if ids is None else ids
        for world, model in zip(worlds, models, strict=True):
            self._models[world] = model
        self._batch.set_models(self._models)

    def bind(self, field: str) -> Tensor:
        """Return the simulator's own tensor ``(world, ...)`` of an ``MjData`` field."""
        array = self._batch.bind(field)
        # Derived fields are read-only to numpy, of which torch would warn.
        array.flags.writeable = True
        return torch.from_numpy(array)

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Advance worlds (default: all); return ``(world,)``, true where the physics broke down."""
        failed: np.ndarray | None = None
        try:
            self._batch.step(selected_ids(rows), nstep=substeps)
        except batch.SimulationError as e:
            failed = e.ids

        # MuJoCo resets a state that is no longer finite and counts a warning, so both are looked
        # at. ``warning`` is (world, kind of warning, (last info, count)).
        broken = torch.from_numpy(self._batch.warning[:, :, 1].any(1))
        broken |= ~torch.isfinite(self._qpos.sum(1) + self._qvel.sum(1))
        if failed is not None:
            broken[torch.from_numpy(failed)] = True
        return broken

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Put worlds (default: all) into a fresh state: without warnings, with current sensors.

        Sensors of forces are zero until the first step.
        """
        ids = selected_ids(rows)
        if isinstance(rows, Tensor):
            qpos = qpos[rows]
            qvel = qvel[rows]

        # Nothing is computed in the reset: the state is written after it.
        self._batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        where = slice(None) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
        self._qpos[where] = qpos
        self._qvel[where] = qvel
        if self._models[0].nsensordata:
            self._batch.forward(ids, stage=mujoco.mjtStage.mjSTAGE_VEL.value)

    def snapshot(self, world: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Return one world's model and a copy of its data, with forward kinematics computed."""
        model = self._models[world]
        data = self._batch.get_data(world)
        mujoco.mj_forward(model, data)
        return model, data


def selected_ids(rows: WorldSelection | None) -> Sequence[int] | None:
    """Return the numbers of the selected worlds; None stays None and means all."""
    return torch.nonzero(rows)[:, 0].tolist() if isinstance(rows, Tensor) else rows
