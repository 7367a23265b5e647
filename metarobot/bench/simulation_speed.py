"""Speed of the environment on the CPU against the bare physics engine, bit for bit the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mujoco
import numpy as np
import torch
from mujoco import batch
from torch import Tensor

from metarobot.bench.harness import (
    Round,
    check_sizes,
    measure_rounds,
    median,
    median_ratio,
    timed,
    usable_threads,
)
from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.sim.cpu import CpuSim, selected_ids
from metarobot.sim.simulator import WorldSelection
from metarobot.tasks.family import Family
from metarobot.threads_and_memory import keep_freed_memory, single_torch_thread


@dataclass
class EngineCall:
    """One call of the physics engine: a control step, or a reset of some worlds."""

    substeps: int = 0
    """Physics steps; 0 for a reset."""
    ctrl: Any = None
    """Targets of the actuators in a step, ``(world, actuator)``."""
    ids: Sequence[int] | None = None
    """Worlds that are reset; None for all."""
    start: dict[str, Any] | None = None
    """State that they are reset to: field -> ``(world, ...)``."""


class RecordingCpuSim(CpuSim):
    """The CPU backend, recording its calls so that the bare engine can repeat them."""

    def __init__(self, models: Sequence[mujoco.MjModel], threads: int = 0) -> None:
        super().__init__(models, threads)
        self.calls: list[EngineCall] = []
        self._ctrl = self.bind("ctrl")
        self._act = self.bind("act")

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Record the targets of a control step, and take it."""
        self.complete_resets()
        self.calls.append(EngineCall(substeps, ctrl=self._ctrl.numpy().copy()))
        return super().step(substeps, rows)

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Record a reset, and do it."""
        start = {"qpos": qpos.numpy(), "qvel": qvel.numpy()}
        self.calls.append(EngineCall(ids=selected_ids(rows), start=start))
        super().reset(qpos, qvel, rows)

    def complete_resets(self) -> None:
        """Add to the last resets what the environment has set the actuators to since."""
        for call in reversed(self.calls):
            if call.start is None:
                break
            call.start["act"] = self._act[_rows(call.ids)].numpy().copy()


def bench_sim(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure control steps a second of the environment and of a bare ``mujoco.batch.Batch``.

    Both simulate the same physics bit for bit: a model object of its own in each world, the same
    substeps, threads and random actions, and the same worlds reset to the same starts. A round is
    an episode of each.

    Args:
        family: What is simulated.
        worlds: Number of worlds.
        seconds: How long to measure, at least.
        threads: Physics threads; 0 takes all there are.
        show: Whether to show a progress bar.

    Raises:
        MetarobotError: No worlds, no time, or physics that are not the same.
    """
    check_sizes(worlds, seconds)
    threads = usable_threads(threads)
    keep_freed_memory()  # as training does

    with single_torch_thread():
        tasks = family.space.sample("train", worlds)
        env = Env(family, tasks, threads=threads, make_sim=RecordingCpuSim)
        stepped = AutoresetEnv(env)
        sim = cast(RecordingCpuSim, env.sim)
        # Tasks may share a model. Copies make every world read memory of its own, as in training.
        models = [copy.copy(env.model(task)) for task in env.tasks]
        env.sim.set_models(models)
        env.reset(0)

        engine = batch.Batch(models[0], worlds, threads)
        engine.set_models(models)
        sim.complete_resets()
        _repeat_calls(engine, sim.calls)

        actions = random_actions(family.horizon, worlds, env.act_dim)

        def run_env() -> None:
            for action in actions:
                stepped.step(action)

        def measure() -> Round:
            sim.calls.clear()
            _, env_s = timed(run_env)
            sim.complete_resets()
            _, engine_s = timed(lambda: _repeat_calls(engine, sim.calls))
            if not np.array_equal(engine.bind("qpos"), env.state.qpos.numpy(), equal_nan=True):
                raise MetarobotError(
                    f"{family.name}: the bare engine did not simulate the same physics; "
                    "nothing to compare"
                )
            steps = family.horizon * worlds
            return {"env": steps / env_s, "engine": steps / engine_s}

        rounds = measure_rounds(measure, seconds, show=show)

    return {
        "family": family.name,
        "worlds": worlds,
        "threads": threads,
        "substeps": family.substeps,
        "rounds": len(rounds),
        "steps_per_s": median(rounds, "env"),
        "engine_steps_per_s": median(rounds, "engine"),
        "ratio": median_ratio(rounds, "env", "engine"),
    }


def random_actions(steps: int, worlds: int, act_dim: int) -> Tensor:
    """Draw actions between −1 and 1, ``(time, world, act)``, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((steps, worlds, act_dim), generator=generator) * 2 - 1


def run_engine(engine: batch.Batch, actions: Tensor, substeps: int) -> None:
    """Step the bare engine under actions ``(time, world, actuator)``, with no resets."""
    _repeat_calls(engine, [EngineCall(substeps, ctrl=action) for action in actions.numpy()])


def _repeat_calls(engine: batch.Batch, calls: Iterable[EngineCall]) -> None:
    ctrl = engine.bind("ctrl")
    for call in calls:
        if call.start is None:
            ctrl[:] = call.ctrl
            engine.step(nstep=call.substeps)
        else:
            engine.reset(call.ids, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
            for name, value in call.start.items():
                engine.bind(name)[_rows(call.ids)] = value


def _rows(ids: Sequence[int] | None) -> Any:
    return slice(None) if ids is None else list(ids)
