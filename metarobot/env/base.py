"""The step loop: a family's tasks in many worlds of batched physics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.env.episode_starts import StartSource, WorldStarts
from metarobot.errors import MetarobotError
from metarobot.sim.cpu import CpuSim
from metarobot.sim.simulator import Sim
from metarobot.tasks.family import Family, WorldState, families
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

__all__ = ["Env", "StepResult"]


class StepResult(NamedTuple):
    """What one control step led to, in every world. Shapes ``(world, ...)``.

    Where a world was inactive in the step, its row means nothing, except that the flags
    ``terminated``, ``truncated`` and ``faulted`` are false.
    """

    obs: Tensor
    """Observation to act on next ``(world, obs)``; ``AutoresetEnv`` puts the next start here."""
    reward: Tensor
    """Weighted sum of the reward terms ``(world,)``."""
    terms: dict[str, Tensor]
    """Reward term -> its value before the weight, ``(world,)``."""
    terminated: Tensor
    """The episode failed, or otherwise ended by the family's own rule."""
    truncated: Tensor
    """The time limit was reached and the episode did not terminate."""
    faulted: Tensor
    """The physics broke down, which terminates with reward 0 and the last valid observation."""
    final_obs: Tensor
    """Observation that the step led to, before any reset."""
    final_critic_obs: Tensor
    """What the critic additionally sees beside ``final_obs``, ``(world, critic)``."""


class Env:
    """Worlds of one family, each on its own task, stepped together.

    This class simulates on the CPU; ``DeviceEnv`` is the same on a device, and ``make_env`` picks
    one of them. ``step`` resets nothing: a world whose episode is over stays where it is until
    ``restart`` (all worlds) or ``restart_worlds``. ``AutoresetEnv`` adds resets to the step.

    On the CPU every world draws from a random stream of its own, keyed by (seed, world, episode):
    what happens in one world never changes another.

    Args:
        family: What is simulated, observed and rewarded.
        tasks: One task a world, each a ``Task`` or parameter name -> value.
        seed: Keys the starts and the noise of the observations.
        threads: Threads of the physics; 0 takes all there are.
        make_sim: (models, threads) -> the simulator.

    Raises:
        MetarobotError: No tasks, or one that is not of this family's space.
    """

    def __init__(
        self,
        family: Family,
        tasks: Sequence[Task | Mapping[str, float]],
        *,
        seed: int = 0,
        threads: int = 0,
        make_sim: Callable[[Sequence[mujoco.MjModel], int], Sim] = CpuSim,
    ) -> None:
        if not tasks:
            raise MetarobotError("an environment needs at least one task")
        self.family = family
        self.tasks = [family.space.coerce(t) for t in tasks]
        self.worlds = len(self.tasks)
        self.world_ids = list(range(self.worlds))
        """Numbers of the worlds, which key their starts."""

        # Tasks that differ only in what the reward reads share one compiled model.
        self._task_models = TaskModels(family)
        self._models: dict[tuple[float, ...], mujoco.MjModel] = {}
        models = [self.model(t) for t in self.tasks]
        first = models[0]
        self.dt = first.opt.timestep * family.substeps
        """Control period, s."""

        # Tensors of the simulator: it writes into them, and they are read and written in place.
        self.sim = make_sim(models, threads)
        qpos = self.sim.bind("qpos")
        qvel = self.sim.bind("qvel")
        no_sensors = qpos.new_zeros(self.worlds, 0)
        sensors = self.sim.bind("sensordata") if first.nsensordata else no_sensors
        self._ctrl = self.sim.bind("ctrl")
        self._act = self.sim.bind("act")
        self.device = qpos.device

        # The bounds of the action are the actuators', or ±1 where a controller stands before them.
        controller = family.interaction.controller
        if controller is None:
            bounds = torch.from_numpy(first.actuator_ctrlrange.T.copy())
        else:
            bounds = torch.tensor([[-1.0], [1.0]]).expand(2, len(controller.actions))
        self.action_low, self.action_high = bounds.to(qpos)

        # The columns of one tensor, so that new tasks are written in place and every function of
        # the family sees them.
        self._values = family.space.values(self.tasks).to(qpos)
        self.task_values = dict(zip(family.space.names, self._values.unbind(1), strict=True))
        """Each task parameter over the worlds, name -> ``(world,)``."""

        statistics = family.interaction.statistics
        self.state = WorldState(
            qpos,
            qvel,
            sensors,
            qpos.new_zeros(self.worlds, self.act_dim),
            self.task_values,
            qpos.new_zeros(self.worlds, 0 if statistics is None else statistics.size),
            torch.zeros(self.worlds, dtype=torch.int64, device=self.device),
        )
        """The simulator's own tensors, which change with every step."""
        self.snapshot = self.state
        """A copy of the state after the last step, with what the family derived from it."""

        self.elapsed = torch.zeros(self.worlds, dtype=torch.int64, device=self.device)
        """Control steps since the start of the episode ``(world,)``."""
        self.over = torch.zeros(self.worlds, dtype=torch.bool, device=self.device)
        """Whether the episode is over ``(world,)``: these worlds wait for a restart."""
        self.episodes = np.full(self.worlds, -1)
        """Number of each world's episode since the last seed, from 0."""

        self.record_readout = False
        """Set to compute ``readout`` at each step; only a film needs it."""
        self.readout: dict[str, Tensor] = {}
        """The family's quantities to display, "name unit" -> ``(world,)``."""

        # Noise is drawn for those observations alone that have any.
        noisy = torch.tensor(family.interaction.noise).nonzero()[:, 0]
        self._noisy = noisy.to(self.device)
        self._weights = torch.tensor(list(family.weights.values())).to(qpos)
        self._starts = self._make_starts(models)
        self.reset(seed)

    # What a backend may do differently.

    def _make_starts(self, models: Sequence[mujoco.MjModel]) -> StartSource:
        """Make the source of the starts for worlds on these models."""
        return WorldStarts(self.family, models, self.world_ids)

    def _simulate(self, active: Tensor | None) -> Tensor:
        """Run the physics of one control step; return where it broke down, ``(world,)``."""
        return self.sim.step(self.family.substeps, active)

    def any_world(self, mask: Tensor) -> bool:
        """Return whether a mask ``(world,)`` holds for any world.

        Where the answer would have to be read back from a device, it is yes without looking.
        """
        return bool(mask.any())

    # Sizes and names.

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return float(1.0 / self.dt)

    @property
    def obs_dim(self) -> int:
        """Length of the observation."""
        return len(self.family.observations)

    @property
    def act_dim(self) -> int:
        """Length of the action."""
        return len(self.action_low)

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the action's elements.

        They are the controller's, if the family has one; otherwise each is the actuator's name, or
        that of its joint where the actuator has none.
        """
        if self.family.interaction.controller is not None:
            return self.family.interaction.controller.actions
        model = self.model(self.tasks[0])
        joints = [model.joint(j).name for j in model.actuator_trnid[:, 0]]
        return tuple(model.actuator(i).name or joint for i, joint in enumerate(joints))

    # Tasks.

    def model(self, task: Task) -> mujoco.MjModel:
        """Return the task's compiled model; tasks that differ in nothing it holds share one."""
        key = self._task_models.key(task)
        if key not in self._models:
            self._make_room_for_a_model()
            self._models[key] = self._task_models.compile(task)
        return self._models[key]

    def _make_room_for_a_model(self) -> None:
        """Forget the compiled models when there are many: new tasks come with every iteration."""
        if len(self._models) >= 4 * max(64, len(self.tasks)):
            self._models.clear()

    def set_tasks(
        self, tasks: Sequence[Task | Mapping[str, float]], ids: Sequence[int] | None = None
    ) -> None:
        """Give worlds ``ids`` (default: all) new tasks, in full effect from their next restart.

        Raises:
            MetarobotError: Another number of tasks than of worlds, or a task of another space.
        """
        rows = list(range(self.worlds)) if ids is None else list(ids)
        checked = [self._check_task(t) for t in tasks]
        if len(checked) != len(rows):
            raise MetarobotError(f"{len(checked)} tasks were given for {len(rows)} worlds")

        # Models and values change at once; the state does not, so until their restart the worlds
        # are in a state of their old task.
        for world, task in zip(rows, checked, strict=True):
            self.tasks[world] = task
        models = [self.model(t) for t in checked]
        self.sim.set_models(models, rows)
        self._starts.set_models(models, rows)
        self._values[rows] = self.family.space.values(checked).to(self._values)

    def _check_task(self, task: Task | Mapping[str, float]) -> Task:
        return self.family.space.coerce(task)

    # Starting episodes.

    def reset(self, seed: int | None = None) -> Tensor:
        """Start the next episode in every world; return the observations ``(world, obs)``.

        With a seed the episodes are counted from 0 again.
        """
        if seed is not None:
            self.seed = seed
            self.episodes[:] = -1
        return self._start_episodes(range(self.worlds), (self.episodes + 1).tolist())

    def restart(self, episode: int) -> Tensor:
        """Put every world at the start of its episode of that number; return the observations.

        The number keys the start: it does not matter how many episodes a world had before.
        """
        return self._start_episodes(range(self.worlds), [episode] * self.worlds)

    def restart_worlds(self, ids: Sequence[int]) -> Tensor:
        """Start the next episode in the worlds ``ids``; return the observations of all worlds."""
        return self._start_episodes(ids, (self.episodes[list(ids)] + 1).tolist())

    def set_state(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Put every world into a state, ``(world, ...)`` each; return the observations."""
        self.sim.reset(qpos, qvel)
        self.snapshot = self._take_snapshot()
        return self._observe()

    def set_variant(self, variant: Tensor) -> Tensor:
        """Make the episodes that are about to start of these variants ``(world,)``.

        Returns the observations ``(world, obs)``.
        """
        self.state.variant.copy_(variant)
        self.snapshot = self._take_snapshot()
        return self._observe()

    def _start_episodes(self, ids: Sequence[int], episodes: Sequence[int]) -> Tensor:
        """Start an episode of that number in each of the worlds ``ids``."""
        self.episodes[list(ids)] = episodes
        start = self._starts.draw(self.seed, ids, episodes)
        everywhere = list(ids) == list(range(self.worlds))
        self._begin(start.qpos, start.qvel, start.variant, None if everywhere else list(ids))
        return self._observe()

    def _begin(
        self, qpos: Tensor, qvel: Tensor, variant: Tensor, ids: Sequence[int] | None = None
    ) -> None:
        """Put the worlds ``ids`` (default: all) at the start of an episode, a row for each."""
        rows: Any = slice(None) if ids is None else ids
        self.sim.reset(qpos, qvel, ids)
        self.state.action[rows] = 0.0
        self.state.variant[rows] = variant.to(self.device)
        self.elapsed[rows] = 0
        self.over[rows] = False

        # Computed for all worlds, since the family's functions know nothing of rows.
        statistics = self.family.interaction.statistics
        if statistics is not None:
            self.state.statistics[rows] = statistics.begin(self.state)[rows]
        self.snapshot = self._take_snapshot()

        # Actuators with a lag have a state of their own, which must begin at their targets.
        controller = self.family.interaction.controller
        if controller is not None:
            targets = controller.rest(qpos)
            self._ctrl[rows] = targets.to(self._ctrl)
            self._act[rows] = targets.to(self._act)

    # Stepping.

    def step(self, action: Tensor, active: Tensor | None = None) -> StepResult:
        """Advance the worlds by one control step under ``action`` ``(world, act)``.

        Only worlds whose episode is under way and that are ``active`` ``(world,)``, by default all,
        are stepped; the others stay where they are.

        Raises:
            MetarobotError: Actions of another shape.
        """
        if tuple(action.shape) != (self.worlds, self.act_dim):
            raise MetarobotError(
                f"actions must be of shape {(self.worlds, self.act_dim)}, not {tuple(action.shape)}"
            )
        if self.any_world(self.over):
            active = ~self.over if active is None else active & ~self.over

        self.apply_action(action, active)
        faulted = self._simulate(active)
        result = self.finish_step(faulted, active)
        self.over |= result.terminated | result.truncated
        return result

    def apply_action(self, action: Tensor, active: Tensor | None = None) -> None:
        """Set the actuators' targets for ``action`` ``(world, act)``, clipped to its bounds.

        This is the first part of ``step``, for those who run the physics themselves.
        """
        state = self.state
        clipped = torch.clamp(action.to(state.action), self.action_low, self.action_high)
        state.action.copy_(clipped)
        if active is not None:
            state.action.masked_fill_(~active[:, None], 0.0)

        controller = self.family.interaction.controller
        if controller is None:
            self._ctrl.copy_(state.action)
        else:
            self._ctrl.copy_(controller.targets(self.snapshot, state.action, self._ctrl))

    def finish_step(self, faulted: Tensor, active: Tensor | None = None) -> StepResult:
        """Observe and reward what the physics of a control step led to: the last part of ``step``.

        ``faulted`` ``(world,)`` tells where the physics broke down.
        """
        family = self.family
        state = self.state
        before = self.snapshot
        self.elapsed += 1 if active is None else active

        # Where the physics broke down, the last valid state takes the place of what it left.
        any_faulted = self.any_world(faulted)
        if any_faulted:
            for now, then in (
                (state.qpos, before.qpos),
                (state.qvel, before.qvel),
                (state.sensors, before.sensors),
            ):
                now.copy_(torch.where(faulted[:, None], torch.nan_to_num(then), now))
            state.action.masked_fill_(faulted[:, None], 0.0)

        after = self._take_snapshot()
        if family.interaction.statistics is not None:
            state.statistics.copy_(family.interaction.statistics.update(before, after))
            after = after._replace(statistics=state.statistics.clone())
        self.snapshot = after

        # reward = Σ_k weight_k · term_k
        terms = family.reward(before, after, self.dt)
        reward = (self._weights @ torch.stack([terms[k] for k in family.weights])).float()
        self.readout = family.display.readout(before, after, self.dt) if self.record_readout else {}
        obs = self._observe()

        if family.interaction.terminate is None:
            terminated = torch.zeros_like(faulted)
        else:
            terminated = family.interaction.terminate(after)
        if any_faulted:
            reward = torch.where(faulted, 0.0, reward)
            terms = {k: torch.where(faulted, 0.0, v) for k, v in terms.items()}
            terminated = terminated | faulted
        truncated = (self.elapsed >= family.horizon) & ~terminated

        # A world that was not stepped is where its episode ended: that is not reported again.
        if active is not None:
            terminated = terminated & active
            truncated = truncated & active
            faulted = faulted & active
        critic_obs = self.critic_obs()
        return StepResult(obs, reward, terms, terminated, truncated, faulted, obs, critic_obs)

    # What is seen of the present state.

    def critic_obs(self) -> Tensor:
        """Return what only a critic is shown of the present state, ``(world, critic)``."""
        critic_observe = self.family.teaching.critic_observe
        if critic_observe is None:
            return torch.zeros(self.worlds, 0, device=self.device)
        return critic_observe(self.snapshot)

    def teacher_action(self) -> Tensor:
        """Return the action to distil from now, ``(world, act)``, NaN where none is known.

        Raises:
            MetarobotError: The family has neither a teacher nor an expert.
        """
        if self.family.teaching.teacher_action is None:
            return self.expert()
        return self.family.teaching.teacher_action(self.snapshot).float()

    def expert(self) -> Tensor:
        """Return what the family's scripted expert does now, ``(world, act)``.

        Raises:
            MetarobotError: The family has none.
        """
        if self.family.teaching.expert is None:
            known = ", ".join(
                n for n in families.names() if families.get(n).teaching.expert is not None
            )
            raise MetarobotError(
                f"{self.family.name} has no scripted expert; those that have one: {known}"
            )
        return self.family.teaching.expert(self.snapshot).float()

    def _observe(self) -> Tensor:
        obs = self.family.observe(self.snapshot)
        if self.family.interaction.noise:
            obs.index_add_(1, self._noisy, self._starts.noise(self.elapsed))
        return obs

    def _take_snapshot(self) -> WorldState:
        """Copy the state, and add what the family derives from it once for all its functions."""
        state = self.state
        snapshot = WorldState(
            state.qpos.clone(),
            state.qvel.clone(),
            state.sensors.clone(),
            state.action.clone(),
            state.task,
            state.statistics.clone(),
            state.variant,
        )
        derive = self.family.interaction.derive
        if derive is None:
            return snapshot
        return snapshot._replace(derived=derive(snapshot))
