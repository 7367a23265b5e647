"""Environments on a device: physics, observations, rewards and restarts without reading back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import cast

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.env.episode_starts import EpisodeStart, StartSource
from metarobot.sim.warp import BufferSizes, WarpError, WarpSim, free_memory, warp_device
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

STARTS_IN_ALL = 4096
"""Starts drawn in advance, over all models together."""
STARTS_PER_MODEL = 8
"""Starts drawn in advance for each model at least."""
PROBED_WORLDS = 32
"""Worlds in which contacts are counted, and memory is measured, to size the buffers."""


class DeviceEnv(Env):
    """Worlds of one family on the device of a ``WarpSim``: an ``Env`` that reads nothing back.

    Starts are drawn in advance, several for each model, and picked on the device by a generator
    keyed by (seed, episode); the noise of the observations is drawn step by step. Warp always steps
    all worlds, so those that are not active are put back to a start before each step, where they do
    no harm: contacts share one buffer.

    Args:
        family: What is simulated, observed and rewarded.
        tasks: One task a world.
        device: Warp's device, ``cpu`` or ``cuda``.
        seed: Keys the starts and the noise.
        buffer_sizes: Sizes of the contact buffers of a world; measured if None.
        pool: Tasks that worlds will be given later: their models are uploaded at once.

    Raises:
        WarpError: No such device, or a family that Warp cannot run.
    """

    def __init__(
        self,
        family: Family,
        tasks: Sequence[Task | Mapping[str, float]],
        *,
        device: str = "cuda",
        seed: int = 0,
        buffer_sizes: BufferSizes | None = None,
        pool: Sequence[Task] = (),
    ) -> None:
        warp_device(device)
        sizes = measure_buffer_sizes(family) if buffer_sizes is None else buffer_sizes
        self._pool = {id(task): task for task in pool}

        def make_sim(models: Sequence[mujoco.MjModel], threads: int) -> WarpSim:
            return WarpSim(models, device=device, buffer_sizes=sizes)

        super().__init__(family, tasks, seed=seed, make_sim=make_sim)

    def _make_starts(self, models: Sequence[mujoco.MjModel]) -> StartSource:
        pooled = [self.model(task) for task in self._pool.values()]
        cast(WarpSim, self.sim).register_models(pooled)
        return PooledStarts(self.family, models, pooled, self.device)

    def _make_room_for_a_model(self) -> None:
        """Forget nothing: the device has all models."""

    def _check_task(self, task: Task | Mapping[str, float]) -> Task:
        # Tasks of the pool were checked when they were drawn; there may be thousands.
        return self._pool.get(id(task)) or super()._check_task(task)

    def _begin(
        self, qpos: Tensor, qvel: Tensor, variant: Tensor, ids: Sequence[int] | None = None
    ) -> None:
        super()._begin(qpos, qvel, variant, ids)
        if ids is None:
            self._parking = (qpos, qvel)  # a start of each world, for when it is not active

    def _simulate(self, active: Tensor | None) -> Tensor:
        if active is not None:
            qpos, qvel = self._parking
            cast(WarpSim, self.sim).park(qpos, qvel, ~active)
        return self.sim.step(self.family.substeps, active)

    def any_world(self, mask: Tensor) -> bool:
        """Return yes, without looking: to look would be to wait for the device."""
        return True


class PooledStarts:
    """Picks starts that were drawn in advance, by a generator on the device."""

    def __init__(
        self,
        family: Family,
        models: Sequence[mujoco.MjModel],
        pooled: Sequence[mujoco.MjModel],
        device: torch.device,
    ) -> None:
        self._family = family
        self._device = device
        self._generator = torch.Generator(device)

        amplitude = torch.tensor(family.interaction.noise)
        self._amplitude = amplitude[amplitude != 0].to(device)

        # Many models have few starts each, and a single model has them all.
        distinct = len({id(m) for m in (*models, *pooled)})
        self._per_model = max(STARTS_PER_MODEL, math.ceil(STARTS_IN_ALL / distinct))
        self._rows: dict[int, int] = {}
        """id of a model -> its row in the pools."""
        first = models[0]
        self._qpos = torch.zeros(0, self._per_model, first.nq, device=device)
        self._qvel = torch.zeros(0, self._per_model, first.nv, device=device)
        self._row_of_world = torch.zeros(len(models), dtype=torch.int64, device=device)
        self._add(pooled)
        self.set_models(models, range(len(models)))

    def set_models(self, models: Sequence[mujoco.MjModel], ids: Sequence[int]) -> None:
        """Note that the worlds ``ids`` are now on these models; draw starts for new ones."""
        self._add(models)
        rows = torch.tensor([self._rows[id(m)] for m in models], device=self._device)
        self._row_of_world[list(ids)] = rows

    def draw(self, seed: int, ids: Sequence[int], episodes: Sequence[int]) -> EpisodeStart:
        """Pick starts for worlds ``ids``.

        For all worlds the generator is keyed anew by (seed, episode); for some of them it goes on
        from where it is.
        """
        if len(ids) == len(self._row_of_world):
            key = np.random.SeedSequence([seed, max(episodes)]).generate_state(1, np.uint64)[0]
            self._generator.manual_seed(int(key >> np.uint64(1)))  # torch takes 63 bits

        picked = torch.randint(
            self._per_model, (len(ids),), generator=self._generator, device=self._device
        )
        variant = torch.zeros(len(ids), dtype=torch.int64, device=self._device)
        if self._family.interaction.variants > 1:
            variant.random_(0, self._family.interaction.variants, generator=self._generator)

        rows = self._row_of_world[list(ids)]
        return EpisodeStart(self._qpos[rows, picked], self._qvel[rows, picked], variant)

    def noise(self, elapsed: Tensor) -> Tensor:
        """Draw the noise ``(world, noisy)`` of one step."""
        draw = torch.rand(
            len(elapsed), len(self._amplitude), generator=self._generator, device=self._device
        )
        return draw.mul_(2).sub_(1).mul_(self._amplitude)

    def _add(self, models: Sequence[mujoco.MjModel]) -> None:
        """Draw starts for those models that have none."""
        new = list({id(m): m for m in models if id(m) not in self._rows}.values())
        if not new:
            return

        qpos = []
        qvel = []
        for model in new:
            row = len(self._rows)
            self._rows[id(model)] = row
            # Keyed by the row alone: the seed of an environment decides which starts are picked.
            rng = np.random.Generator(np.random.Philox(key=[0, row]))
            starts = [self._family.start(rng, model) for _ in range(self._per_model)]
            qpos.append(np.stack([start[0] for start in starts]))
            qvel.append(np.stack([start[1] for start in starts]))
        self._qpos = torch.cat([self._qpos, torch.from_numpy(np.stack(qpos)).to(self._qpos)])
        self._qvel = torch.cat([self._qvel, torch.from_numpy(np.stack(qvel)).to(self._qvel)])


def measure_buffer_sizes(family: Family, steps: int = 60) -> BufferSizes:
    """Size the buffers from what random actions in a few tasks need on the CPU, with a margin."""
    env = Env(family, family.space.sample("train", PROBED_WORLDS, 0), threads=1)
    stepped = AutoresetEnv(env)
    contacts = env.sim.bind("ncon")
    constraints = env.sim.bind("nefc")
    most_contacts = 0
    most_constraints = 0

    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would spin and take the cores from the physics
    for _ in range(min(steps, family.horizon)):
        uniform = torch.rand(env.worlds, env.act_dim, generator=generator)
        stepped.step(env.action_low + (env.action_high - env.action_low) * uniform)
        most_contacts = max(most_contacts, int(contacts.max()))
        most_constraints = max(most_constraints, int(constraints.max()))
    torch.set_num_threads(threads)
    return BufferSizes(int(1.5 * most_contacts) + 8, int(2 * most_constraints) + 16)


def bytes_per_world(family: Family, device: str = "cuda") -> int:
    """Return the memory that one more world, on a model of its own, takes on the device.

    Raises:
        WarpError: No such device, or a family that Warp cannot run.
    """
    warp_device(device)
    sizes = measure_buffer_sizes(family)
    task_models = TaskModels(family)
    tasks = family.space.sample("train", PROBED_WORLDS, 0)
    distinct = {task_models.key(t): task_models.compile(t) for t in tasks}
    models = list(itertools.islice(itertools.cycle(distinct.values()), PROBED_WORLDS))

    # The difference of two sizes leaves out what all worlds share.
    half = PROBED_WORLDS // 2
    bytes_of_half = WarpSim(models[:half], device=device, buffer_sizes=sizes).bytes
    bytes_of_all = WarpSim(models, device=device, buffer_sizes=sizes).bytes
    return 2 * (bytes_of_all - bytes_of_half) // PROBED_WORLDS


def check_memory(family: Family, worlds: int, device: str = "cuda") -> None:
    """Check that the device can hold so many worlds.

    Raises:
        WarpError: Too many worlds, no such device, or a family that Warp cannot run.
    """
    per_world = bytes_per_world(family, device)
    free = free_memory(device)
    if worlds * per_world > free:
        raise WarpError(
            f"{worlds:,} worlds of {family.name} need {worlds * per_world / 1e9:,.1f} GB, and the "
            f"device has {free / 1e9:,.1f} GB free: about {int(0.9 * free / per_world):,} would "
            "fit, with no memory left to learn in"
        )
