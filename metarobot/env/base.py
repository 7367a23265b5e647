"""The one step loop: a family's tasks in many worlds of batched physics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.errors import MetarobotError
from metarobot.sim.cpu import CpuSim
from metarobot.sim.protocol import Sim
from metarobot.tasks.family import Family, WorldState, families
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

__all__ = ["Env", "StepResult"]


class StepResult(NamedTuple):
    """What one control step gave. Shapes ``(world, ...)``.

    ``obs`` is the observation to act on next, after the reset where one happened; ``final_obs`` the
    one the step led to, before any reset. ``terminated``: the episode failed; ``truncated``: its
    time is up; ``faulted``: the physics broke down, which terminates too, with reward zero and the
    last sound observation. ``final_critic_obs`` is what a critic was shown beside ``final_obs``.
    """

    obs: Tensor
    reward: Tensor
    terms: dict[str, Tensor]
    terminated: Tensor
    truncated: Tensor
    faulted: Tensor
    final_obs: Tensor
    final_critic_obs: Tensor


class Env:
    """Worlds of one family, each with its own task, stepped together.

    Every world's starts are drawn from a stream of its own, keyed by (seed, world, episode): what
    happens in one world never reaches another. ``resample``, if given, draws a new task for a world
    at each autoreset.
    """

    def __init__(
        self,
        family: Family,
        tasks: Sequence[Task | Mapping[str, float]],
        *,
        seed: int = 0,
        threads: int = 0,
        resample: Callable[[int, int], Task] | None = None,
        make_sim: Callable[[Sequence[mujoco.MjModel], int], Sim] = CpuSim,
    ) -> None:
        if not tasks:
            raise MetarobotError("an environment needs at least one task")
        self.family, self.resample = family, resample
        self._maker = TaskModels(family)
        self._models: dict[tuple[float, ...], mujoco.MjModel] = {}
        self.tasks = [family.space.coerce(t) for t in tasks]
        self.sim = make_sim([self.model(t) for t in self.tasks], threads)
        self.worlds = len(self.tasks)
        self.world_ids = list(range(self.worlds))
        """Numbers of the worlds, which key their starts."""
        first = self.model(self.tasks[0])
        self.dt = first.opt.timestep * family.substeps
        bounds = torch.from_numpy(first.actuator_ctrlrange.T.copy())
        if family.interaction.controller is not None:
            bounds = torch.tensor([[-1.0], [1.0]]).expand(
                2, len(family.interaction.controller.actions)
            )
        qpos, qvel = self.sim.bind("qpos"), self.sim.bind("qvel")
        self.device = qpos.device
        self.action_low, self.action_high = bounds.to(qpos)
        self._values = family.space.values(self.tasks).to(qpos)
        self.task_values = dict(zip(family.space.names, self._values.unbind(1), strict=True))
        """Each task parameter over the worlds, name -> ``(world,)``."""
        sensors = (
            self.sim.bind("sensordata") if first.nsensordata else qpos.new_zeros(self.worlds, 0)
        )
        action = qpos.new_zeros(self.worlds, self.act_dim)
        statistics = qpos.new_zeros(
            self.worlds,
            0 if family.interaction.statistics is None else family.interaction.statistics.size,
        )
        variant = torch.zeros(self.worlds, dtype=torch.int64, device=self.device)
        self.state = WorldState(qpos, qvel, sensors, action, self.task_values, statistics, variant)
        self._ctrl, self._act = self.sim.bind("ctrl"), self.sim.bind("act")
        self.elapsed = torch.zeros(self.worlds, dtype=torch.int64, device=self.device)
        noisy = torch.tensor(family.interaction.noise).nonzero()[:, 0]
        self._amplitude = torch.tensor(family.interaction.noise)[noisy].to(self.device)
        self._noisy = noisy.to(self.device)
        self._weights = torch.tensor(list(family.weights.values())).to(qpos)
        self.snapshot = self.state
        """The present moment as the family's functions see it: a copy, with what they share."""
        self._prepare()
        self.reset(seed)

    def _prepare(self) -> None:
        """Make room for the noise of whole episodes, drawn at their starts."""
        self._noise = torch.zeros(self.worlds, self.family.horizon + 1, len(self._noisy))
        self._rows = torch.arange(self.worlds)

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return float(1.0 / self.dt)

    @property
    def act_dim(self) -> int:
        """Length of the action."""
        return len(self.action_low)

    @property
    def action_names(self) -> tuple[str, ...]:
        """Name the action's elements: by the family's controller, or its drives; a nameless drive
        by its joint.
        """
        if self.family.interaction.controller is not None:
            return self.family.interaction.controller.actions
        model = self.model(self.tasks[0])
        joints = [model.joint(j).name for j in model.actuator_trnid[:, 0]]
        return tuple(model.actuator(i).name or joint for i, joint in enumerate(joints))

    @property
    def obs_dim(self) -> int:
        """Length of the observation."""
        return len(self.family.observations)

    def model(self, task: Task) -> mujoco.MjModel:
        """Compile the task's model, or take the one of a task that differs in nothing the model
        holds.
        """
        key = self._maker.key(task)
        if key not in self._models:
            if len(self._models) >= 4 * max(64, len(self.tasks)):
                self._models.clear()
            self._models[key] = self._maker.compile(task)
        return self._models[key]

    def set_tasks(
        self, tasks: Sequence[Task | Mapping[str, float]], ids: Sequence[int] | None = None
    ) -> None:
        """Give worlds (default: all) new tasks; they take effect in full at those worlds' next
        reset.
        """
        rows = list(range(self.worlds)) if ids is None else list(ids)
        checked = [self._checked(t) for t in tasks]
        if len(checked) != len(rows):
            raise MetarobotError(f"{len(checked)} tasks were given for {len(rows)} worlds")
        for i, task in zip(rows, checked, strict=True):
            self.tasks[i] = task
        self.sim.set_models([self.model(t) for t in checked], rows)
        self._values[rows] = self.family.space.values(checked).to(self._values)

    def _checked(self, task: Task | Mapping[str, float]) -> Task:
        return self.family.space.coerce(task)

    def reset(self, seed: int | None = None) -> Tensor:
        """Start an episode in every world and return the observations; a seed restarts the count of
        episodes.
        """
        if seed is not None:
            self.seed, self._episode = seed, np.full(self.worlds, -1)
        self._restart(range(self.worlds))
        return self._observe()

    def restart(self, episode: int) -> Tensor:
        """Put every world at the start of its episode of that number; return the observations
        ``(world, obs)``.

        The number keys the start, so a world that lived through many short episodes meanwhile
        starts as any other.
        """
        elsewhere = (self.elapsed > 0).numpy() | (self._episode != episode)
        if elsewhere.any():
            self._episode[elsewhere] = episode - 1
            self._restart(np.flatnonzero(elsewhere).tolist())
        return self._observe()

    def set_state(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Put every world into a state, ``(world, ...)`` each; return the observations."""
        self.sim.reset(qpos, qvel)
        self.snapshot = self._take_snapshot()
        return self._observe()

    def set_variant(self, variant: Tensor) -> Tensor:
        """Make the episodes that are about to start of these variants, ``(world,)``; return the
        observations.
        """
        self.state.variant.copy_(variant)
        self.snapshot = self._take_snapshot()
        return self._observe()

    def _restart(self, ids: Sequence[int]) -> None:
        starts = []
        for i in ids:
            self._episode[i] += 1
            stream = np.random.Philox(
                key=[self.seed, self.world_ids[i]], counter=[0, 0, 0, int(self._episode[i])]
            )
            rng = np.random.Generator(stream)
            starts.append(self.family.start(rng, self.model(self.tasks[i])))
            if self.family.interaction.noise:
                noise = self._noise[i]
                rng.random(dtype=np.float32, out=noise.numpy())
                noise.mul_(2).sub_(1).mul_(self._amplitude)
            if self.family.interaction.variants > 1:
                self.state.variant[i] = int(rng.integers(self.family.interaction.variants))
        qpos, qvel = (torch.from_numpy(np.stack(x)) for x in zip(*starts, strict=True))
        self._begin(qpos, qvel, None if len(ids) == self.worlds else list(ids))

    def _begin(self, qpos: Tensor, qvel: Tensor, ids: Sequence[int] | None = None) -> None:
        """Put the worlds of ``ids`` (default: all) at the start of an episode."""
        rows: Any = slice(None) if ids is None else ids
        self.sim.reset(qpos, qvel, ids)
        self.state.action[rows] = 0.0
        self.elapsed[rows] = 0
        if self.family.interaction.statistics is not None:
            self.state.statistics[rows] = self.family.interaction.statistics.begin(self.state)[rows]
        self.snapshot = self._take_snapshot()
        if self.family.interaction.controller is not None:
            self._ctrl[rows] = self._act[rows] = self.family.interaction.controller.rest(qpos)

    def _observe(self) -> Tensor:
        obs = self.family.observe(self.snapshot)
        return (
            obs
            if not self.family.interaction.noise
            else obs.index_add_(1, self._noisy, self._disturbance())
        )

    def _disturbance(self) -> Tensor:
        """Return the noise of the observations that have any, ``(world, noisy)``."""
        return self._noise[self._rows, self.elapsed]

    def critic_obs(self) -> Tensor:
        """Return what only a critic is shown of the present state, ``(world, critic)``."""
        see = self.family.teaching.critic_observe
        return (
            torch.zeros(self.worlds, 0, device=self.device) if see is None else see(self.snapshot)
        )

    def teacher_action(self) -> Tensor:
        """Return what a learner is taught to do now, ``(world, act)``, NaN where nothing is
        known.
        """
        return (
            self.expert()
            if self.family.teaching.teacher_action is None
            else self.family.teaching.teacher_action(self.snapshot).float()
        )

    def expert(self) -> Tensor:
        """Return what the family's expert would do now, ``(world, act)``; raise if it has none."""
        if self.family.teaching.expert is None:
            known = ", ".join(
                n for n in families.names() if families.get(n).teaching.expert is not None
            )
            raise MetarobotError(
                f"{self.family.name} has no scripted expert; those that have one: {known}"
            )
        return self.family.teaching.expert(self.snapshot).float()

    def step(self, action: Tensor, awake: Tensor | None = None) -> StepResult:
        """Advance every world by one control step under ``action`` ``(world, act)``; worlds that
        end are reset.

        Where ``awake`` ``(world,)`` is false nothing happens, and what is returned there means
        nothing.
        """
        if tuple(action.shape) != (self.worlds, self.act_dim):
            raise MetarobotError(
                f"actions must be of shape {(self.worlds, self.act_dim)}, not {tuple(action.shape)}"
            )
        self.apply_action(action, awake)
        step = self.finish_step(self.sim.step(self.family.substeps, awake), awake)
        if self.any_world(step.terminated | step.truncated):
            step = step._replace(obs=self._autoreset(step.terminated | step.truncated))
        return step

    def apply_action(self, action: Tensor, awake: Tensor | None = None) -> None:
        """Set the drives' targets for ``action`` ``(world, act)``, clipped: the first part of
        ``step``.
        """
        state, control = self.state, self.family.interaction.controller
        state.action.copy_(
            torch.clamp(action.to(state.action.dtype), self.action_low, self.action_high)
        )
        if awake is not None:
            state.action.masked_fill_(~awake[:, None], 0.0)
        self._ctrl.copy_(
            state.action
            if control is None
            else control.targets(self.snapshot, state.action, self._ctrl)
        )

    def finish_step(self, faulted: Tensor, awake: Tensor | None = None) -> StepResult:
        """Say what the physics of a control step led to, ``faulted`` where it broke down: the last
        part of ``step``.
        """
        family, state, before = self.family, self.state, self.snapshot
        self.elapsed += 1 if awake is None else awake
        broken = self.any_world(faulted)
        if broken:
            for now, then in zip(state[:3], before[:3], strict=True):
                now.copy_(torch.where(faulted[:, None], torch.nan_to_num(then), now))
            state.action.masked_fill_(faulted[:, None], 0.0)
        after = self.snapshot = self._take_snapshot()
        if family.interaction.statistics is not None:
            state.statistics.copy_(family.interaction.statistics.update(before, after))
            after = self.snapshot = after._replace(statistics=state.statistics.clone())
        terms = family.reward(before, after, self.dt)
        reward = (self._weights @ torch.stack([terms[k] for k in family.weights])).float()
        self.readout = family.display.readout(before, after, self.dt) if self.record_readout else {}
        obs = self._observe()
        terminated = (
            torch.zeros_like(faulted)
            if family.interaction.terminate is None
            else family.interaction.terminate(after)
        )
        if broken:
            reward = torch.where(faulted, 0.0, reward)
            terms = {k: torch.where(faulted, 0.0, v) for k, v in terms.items()}
            terminated = terminated | faulted
        truncated = (self.elapsed >= family.horizon) & ~terminated
        if awake is not None:
            terminated, truncated, faulted = terminated & awake, truncated & awake, faulted & awake
        return StepResult(
            obs, reward, terms, terminated, truncated, faulted, obs, self.critic_obs()
        )

    def _take_snapshot(self) -> WorldState:
        """Copy the state, and make of it what the family's functions share."""
        live = self.state
        qpos, qvel, sensors, action = (x.clone() for x in live[:4])
        moment = WorldState(
            qpos, qvel, sensors, action, live.task, live.statistics.clone(), live.variant
        )
        return (
            moment
            if self.family.interaction.derive is None
            else moment._replace(derived=self.family.interaction.derive(moment))
        )

    def any_world(self, mask: Tensor) -> bool:
        """Say whether a mask ``(world,)`` holds for any world; where the answer would have to be
        waited for, yes.
        """
        return bool(mask.any())

    record_readout = False
    """Set to compute ``readout`` at each step: only a video looks at it."""

    def _autoreset(self, over: Tensor) -> Tensor:
        ids = torch.nonzero(over)[:, 0].tolist()
        if self.resample is not None:
            self.set_tasks([self.resample(i, int(self._episode[i]) + 1) for i in ids], ids)
        self._restart(ids)
        return self._observe()
