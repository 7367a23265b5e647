"""Environments whose worlds never leave the device: physics, observations, rewards and resets,
nothing read back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import cast

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.env.base import Env, StepResult
from metarobot.sim.warp import BufferSizes, WarpError, WarpSim, free_memory, warp_device
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

STARTS = 4096
"""Starts drawn in advance, over all models; at least ``LEAST`` of each."""
LEAST = 8
PROBED = 32
"""Worlds in which contacts are counted to size the buffers."""


class DeviceEnv(Env):
    """Worlds of one family on the device of a ``WarpSim``.

    It differs from ``Env`` in what would have to be read back. Starts are drawn in advance, some of
    each model, and picked on the device by a generator keyed by (seed, episode); sensor noise is
    drawn step by step. A world whose episode is over, or whose physics broke down, waits at a start
    until all are restarted: ``step`` resets nothing.
    """

    def __init__(
        self,
        family: Family,
        tasks: Sequence[Task | Mapping[str, float]],
        *,
        device: str = "cuda",
        seed: int = 0,
        room: BufferSizes | None = None,
        pool: Sequence[Task] = (),
    ) -> None:
        """Make a world for each task, and whatever the tasks of ``pool`` need, so that dealing them
        out is cheap.
        """
        warp_device(device)
        self._chance = torch.Generator(device)
        self._drawn: dict[int, int] = {}
        self._pool = {id(t): t for t in pool}
        room = measure_buffer_sizes(family) if room is None else room
        super().__init__(
            family,
            tasks,
            seed=seed,
            make_sim=lambda models, _: WarpSim(models, device=device, room=room),
        )

    def _prepare(self) -> None:
        first, pooled = self.model(self.tasks[0]), [self.model(t) for t in self._pool.values()]
        cast(WarpSim, self.sim).know(pooled)
        self._each = max(
            LEAST, math.ceil(STARTS / len({id(m) for m in (*map(self.model, self.tasks), *pooled)}))
        )
        self._starts = [
            torch.zeros(0, self._each, n, device=self.device) for n in (first.nq, first.nv)
        ]
        self._origin = torch.zeros(self.worlds, dtype=torch.int64, device=self.device)
        self._start(pooled)
        self._draw(list(range(self.worlds)))

    def model(self, task: Task) -> mujoco.MjModel:
        """Compile the task's model, or take the one of a task that differs in nothing the model
        holds.
        """
        key = self._maker.key(task)  # none is forgotten: the device has them all
        return self._models.setdefault(key, self._models.get(key) or self._maker.compile(task))

    def _checked(self, task: Task | Mapping[str, float]) -> Task:
        return self._pool.get(id(task)) or super()._checked(task)

    def set_tasks(
        self, tasks: Sequence[Task | Mapping[str, float]], ids: Sequence[int] | None = None
    ) -> None:
        """Give worlds (default: all) new tasks; those that were there before cost a gather on the
        device.
        """
        super().set_tasks(tasks, ids)
        self._draw(list(range(self.worlds)) if ids is None else list(ids))

    def _draw(self, rows: Sequence[int]) -> None:
        """Say which starts are each world's."""
        models = [self.model(self.tasks[i]) for i in rows]
        self._start(models)
        self._origin[rows] = torch.tensor([self._drawn[id(m)] for m in models], device=self.device)

    def _start(self, models: Sequence[mujoco.MjModel]) -> None:
        """Draw starts for models that have none."""
        new = {id(m): m for m in models if id(m) not in self._drawn}
        if new:
            drawn = [self._draw_starts(m, len(self._drawn) + k) for k, m in enumerate(new.values())]
            for k, kind in enumerate(zip(*drawn, strict=True)):
                fresh = torch.from_numpy(np.stack(kind)).to(self._starts[k])
                self._starts[k] = torch.cat([self._starts[k], fresh])
            self._drawn |= {key: len(self._drawn) + k for k, key in enumerate(new)}

    def _draw_starts(self, model: mujoco.MjModel, row: int) -> tuple[np.ndarray, ...]:
        rng = np.random.Generator(np.random.Philox(key=[0, row]))
        pairs = [self.family.start(rng, model) for _ in range(self._each)]
        return tuple(np.stack(x) for x in zip(*pairs, strict=True))

    def reset(self, seed: int | None = None) -> Tensor:
        """Start the first episode in every world and return the observations; a seed takes the last
        one's place.
        """
        self.seed = self.seed if seed is None else seed
        return self.restart(0)

    def restart(self, episode: int) -> Tensor:
        """Put every world at the start of its episode of that number; return the observations
        ``(world, obs)``.
        """
        key = np.random.SeedSequence([self.seed, episode]).generate_state(1, np.uint64)[0]
        self._chance.manual_seed(int(key >> np.uint64(1)))
        picked = torch.randint(
            self._each, (self.worlds,), generator=self._chance, device=self.device
        )
        if self.family.interaction.variants > 1:
            n = self.family.interaction.variants
            self.state.variant.random_(0, n, generator=self._chance)
        self._rest = [starts[self._origin, picked] for starts in self._starts]
        self._begin(self._rest[0], self._rest[1])
        return self._observe()

    def _disturbance(self) -> Tensor:
        draw = torch.rand(self.worlds, len(self._noisy), generator=self._chance, device=self.device)
        return draw.mul_(2).sub_(1).mul_(self._amplitude)

    def step(self, action: Tensor, awake: Tensor | None = None) -> StepResult:
        """Advance every world by one control step; those whose episode is over wait until all are
        restarted.
        """
        self.apply_action(action, awake)
        step = self.finish_step(self.sim.step(self.family.substeps, awake), awake)
        over = step.terminated | step.truncated
        self.sim.reset(self._rest[0], self._rest[1], over if awake is None else over | ~awake)
        return step

    def any_world(self, mask: Tensor) -> bool:
        """Say yes, without looking."""
        return True


def measure_buffer_sizes(family: Family, steps: int = 60) -> BufferSizes:
    """Size the buffers from what the CPU needs: random actions in a few tasks, with a margin."""
    env = Env(family, family.space.sample("train", PROBED, 0), threads=1)
    contacts, rows = env.sim.bind("ncon"), env.sim.bind("nefc")
    generator = torch.Generator().manual_seed(0)
    most, threads = torch.zeros(2, dtype=torch.int64), torch.get_num_threads()
    torch.set_num_threads(1)  # they would spin against the physics
    for _ in range(min(steps, family.horizon)):
        low, high = env.action_low, env.action_high
        env.step(low + (high - low) * torch.rand(env.worlds, env.act_dim, generator=generator))
        most = torch.maximum(most, torch.stack([contacts.max(), rows.max()]).long())
    torch.set_num_threads(threads)
    return BufferSizes(int(1.5 * most[0]) + 8, int(2 * most[1]) + 16)


def bytes_per_world(family: Family, device: str = "cuda") -> int:
    """Return the memory that one more world of its own model takes on the device, or raise for what
    Warp cannot run.
    """
    warp_device(device)
    maker, room = TaskModels(family), measure_buffer_sizes(family)
    made = {maker.key(t): maker.compile(t) for t in family.space.sample("train", PROBED, 0)}
    models = list(itertools.islice(itertools.cycle(made.values()), PROBED))
    fewer, more = (
        WarpSim(models[:n], device=device, room=room).bytes for n in (PROBED // 2, PROBED)
    )
    return 2 * (more - fewer) // PROBED


def check_memory(family: Family, worlds: int, device: str = "cuda") -> None:
    """Raise for more worlds than the device has memory for, and for a family that Warp cannot
    run.
    """
    each, free = bytes_per_world(family, device), free_memory(device)
    if worlds * each > free:
        raise WarpError(
            f"{worlds:,} worlds of {family.name} need {worlds * each / 1e9:,.1f} GB, and the device has "
            f"{free / 1e9:,.1f} GB free: about {int(0.9 * free / each):,} would fit, with nothing yet to learn in"
        )
