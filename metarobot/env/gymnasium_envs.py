"""Gymnasium environments: ``GymEnv`` is one world, ``GymVecEnv`` many worlds in one batch.

Every family has the id ``metarobot/<Name>-v0``, for ``gymnasium.make`` and ``gymnasium.make_vec``.
A task is an option of ``reset``; without it each episode draws a new one. ``info["task"]`` is the
task that the observation belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.env.gymnasium_common import Array as Array
from metarobot.env.gymnasium_common import (
    WorldSet,
    check_options,
    check_render_mode,
    parse_action,
    parse_tasks,
    to_numpy,
)
from metarobot.env.gymnasium_ids import register_gymnasium_ids
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels

RENDER_MODES = ("human", "rgb_array")


def register() -> None:
    """Give every family its Gymnasium id.

    ``import metarobot`` does it for those that come by entry points; call this for families that
    were registered since.
    """
    register_gymnasium_ids(families.names())


class GymEnv(gymnasium.Env[Array, Array]):
    """One world, whose task is drawn at each reset unless ``options={"task": ...}`` names it.

    An episode is truncated after the family's horizon. ``info``: task, name -> value;
    reward_terms, name -> value before its weight; faulted, whether the physics broke down.

    Args:
        family: A family or its name.
        split: The split of the task space that tasks are drawn from.
        sim: ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp).
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        render_mode: ``rgb_array``, ``human``, or None for no pictures.
        width: Width of a picture in pixels.
        height: Height of a picture in pixels.

    Raises:
        MetarobotError: An unknown family, split, simulator or render mode.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 20}  # noqa: RUF012 (Gymnasium's type)

    def __init__(
        self,
        family: str | Family,
        *,
        split: str = "train",
        sim: str = "cpu",
        device: str = "cpu",
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
    ) -> None:
        check_render_mode(render_mode, RENDER_MODES)
        self._world = WorldSet(
            family,
            1,
            split=split,
            sim=sim,
            device=device,
            threads=1,
            width=width,
            height=height,
        )
        self.env = self._world.env
        self.metadata = {**self.metadata, "render_fps": round(self.env.control_hz)}
        self.observation_space, self.action_space = self._world.spaces()
        self.render_mode = render_mode
        self._size = (width, height)
        self._window: _Window | None = None
        self._started = False
        self._last_picture: Array | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode and return its first observation and info.

        Options: ``task``, a task or its values by name.

        Raises:
            MetarobotError: Another option, or a task that the family does not have.
        """
        options = check_options(options, ("task",))
        space = self.env.family.space
        given = space.coerce(options["task"]) if "task" in options else None
        super().reset(seed=seed)
        # One seed for the task and one for the start, so that a task given as an option does not
        # change the start.
        task_seed, start_seed = (int(s) for s in self.np_random.integers(2**63, size=2))
        self.env.set_tasks([given or self._world.sample_task(task_seed)])
        obs = to_numpy(self.env.reset(start_seed)[0])
        self._started = True
        self._last_picture = None
        if self.render_mode == "human":
            self._show()
        return obs, {"task": self.env.tasks[0].as_dict()}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Advance by one control step; return obs, reward, terminated, truncated and info.

        Raises:
            ResetNeeded: The episode is over, or none was started.
            MetarobotError: An action of another shape.
        """
        if not self._started or bool(self.env.over[0]):
            raise ResetNeeded("no episode is under way: call reset() before step()")
        step = self.env.step(parse_action(action, self.action_space.shape or ())[None])
        if self.render_mode == "human":
            self._show()
        elif self.render_mode == "rgb_array" and bool(self.env.over[0]):
            # Taken once: the camera glides after the robot from picture to picture.
            self._last_picture = self._world.picture(0)
        info = {
            "task": self.env.tasks[0].as_dict(),
            "reward_terms": {k: float(v[0]) for k, v in step.terms.items()},
            "faulted": bool(step.faulted[0]),
        }
        terminated = bool(step.terminated[0])
        truncated = bool(step.truncated[0])
        return to_numpy(step.obs[0]), float(step.reward[0]), terminated, truncated, info

    def render(self) -> Array | None:
        """Return a picture ``(height, width, 3)`` uint8 in the mode ``rgb_array``.

        The mode ``human`` draws its window by itself at every step.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() draws nothing without a render_mode, e.g. render_mode='rgb_array'"
            )
        if self.render_mode != "rgb_array":
            return None
        return self._world.picture(0) if self._last_picture is None else self._last_picture

    def close(self) -> None:
        """Close the window or the renderer."""
        self._world.close()
        if self._window is not None:
            self._window.close()
            self._window = None

    def _show(self) -> None:
        if self._window is None:
            self._window = _Window(self.env.family, *self._size)
        self._window.show(self.env, 0)


class GymVecEnv(gymnasium.vector.VectorEnv[Array, Array, Array]):
    """Many worlds stepped together, each on its own task, reset in the step that ends an episode.

    A world gets a new task from ``split`` at each autoreset, unless ``resample`` is false. What
    happens in a world depends on the seed, its index and its actions alone. ``infos`` are
    Gymnasium's arrays with masks and hold what those of ``GymEnv`` do; where an episode ended,
    ``final_obs`` and ``final_info`` belong to the old task, ``task`` to the new one, and
    ``reward_terms`` to the reward returned.

    Args:
        family: A family or its name.
        num_envs: Number of worlds.
        split: The split of the task space that tasks are drawn from.
        resample: Whether each autoreset draws a new task.
        sim: ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp, where each new model is uploaded and kept).
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        threads: Threads of MuJoCo on the CPU; 0 takes all there are.
        render_mode: ``rgb_array``, or None for no pictures.
        width: Width of a picture in pixels.
        height: Height of a picture in pixels.

    Raises:
        MetarobotError: An unknown family, split, simulator or render mode, or no worlds.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's type)
        "render_modes": ["rgb_array"],
        "render_fps": 20,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    OPTIONS: ClassVar = ("task", "resample")

    def __init__(
        self,
        family: str | Family,
        num_envs: int = 1,
        *,
        split: str = "train",
        resample: bool = True,
        sim: str = "cpu",
        device: str = "cpu",
        threads: int = 0,
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
    ) -> None:
        check_render_mode(render_mode, ("rgb_array",))
        self._worlds = WorldSet(
            family,
            num_envs,
            split=split,
            sim=sim,
            device=device,
            threads=threads,
            width=width,
            height=height,
        )
        self.env = self._worlds.env
        self._autoreset = AutoresetEnv(self.env, self._next_task)
        self.resample = resample
        self._keep_tasks = not resample
        self._seed = 0

        self.metadata = {**self.metadata, "render_fps": round(self.env.control_hz)}
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space, self.single_action_space = self._worlds.spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._all = np.ones(num_envs, bool)
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode in every world and return the first observations and infos.

        Options: ``task``, one for all worlds or a list of one a world, for their first episode;
        ``resample``, to keep (False) or change (True) tasks at the autoresets until the next reset.

        Raises:
            MetarobotError: Another option, or a task that the family does not have.
        """
        options = check_options(options, self.OPTIONS)
        tasks = None
        if "task" in options:
            tasks = parse_tasks(self.env.family.space, options["task"], self.num_envs)
        super().reset(seed=seed)
        self._seed, start_seed = (int(s) for s in self.np_random.integers(2**63, size=2))
        self._keep_tasks = not options.get("resample", self.resample)
        if tasks is None:
            tasks = [self._worlds.sample_task(self._seed, i, 0) for i in range(self.num_envs)]
        self.env.set_tasks(tasks)
        obs = to_numpy(self.env.reset(start_seed))
        self._started = True
        self._tasks = self._task_info()
        return obs, masked_infos({"task": self._tasks}, self._all)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Advance every world by one control step; restart those whose episode ended.

        Raises:
            ResetNeeded: No episode was started.
            MetarobotError: Actions of another shape.
        """
        if not self._started:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        step = self._autoreset.step(parse_action(actions, self.action_space.shape or ()))
        terminated = to_numpy(step.terminated).copy()
        truncated = to_numpy(step.truncated)
        done = terminated | truncated

        infos: dict[str, Any] = {
            "reward_terms": {k: to_numpy(v.double()).copy() for k, v in step.terms.items()},
            "faulted": to_numpy(step.faulted),
        }
        per_world = dict(infos)
        if done.any():
            # The task of the episode that ended, before the one of the episode that began.
            final_info = masked_infos({**infos, "task": self._tasks}, done)
            self._tasks = self._task_info()
            infos["final_obs"] = _object_rows(to_numpy(step.final_obs), done)
            infos["_final_obs"] = done
            infos["final_info"] = final_info
            infos["_final_info"] = done
        infos |= masked_infos({**per_world, "task": self._tasks}, self._all)
        return to_numpy(step.obs), to_numpy(step.reward), terminated, truncated, infos

    def render(self) -> tuple[Array, ...] | None:
        """Return a picture ``(height, width, 3)`` uint8 of each world."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without render_mode='rgb_array'")
            return None
        return tuple(self._worlds.pictures())

    def close_extras(self, **kwargs: Any) -> None:
        """Close the renderer."""
        self._worlds.close()

    def _next_task(self, world: int, episode: int) -> Task:
        if self._keep_tasks:
            return self.env.tasks[world]
        return self._worlds.sample_task(self._seed, world, episode)

    def _task_info(self) -> dict[str, Array]:
        return {k: to_numpy(v.double()).copy() for k, v in self.env.task_values.items()}


def masked_infos(info: Mapping[str, Any], mask: Array) -> dict[str, Any]:
    """Lay out arrays ``(world, ...)`` as Gymnasium's infos: each beside its ``_name`` mask.

    Values outside the mask are zero.
    """
    infos: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, Mapping):
            infos[name] = masked_infos(value, mask)
        elif mask.all():
            infos[name] = value
        else:
            infos[name] = np.where(mask, value, 0).astype(value.dtype)
        infos["_" + name] = mask.copy()
    return infos


def _object_rows(array: Array, mask: Array) -> Array:
    """Return an array of objects: a row of ``array`` where the mask holds, None elsewhere."""
    rows = np.full(len(array), None, object)
    for i in np.flatnonzero(mask):
        rows[i] = array[i].copy()
    return rows


class _Window:
    """A window on one world, drawn by Gymnasium's MuJoCo viewer with textures and lights."""

    def __init__(self, family: Family, width: int, height: int) -> None:
        self._task_models = TaskModels(family, visual=True)
        self._size = (width, height)
        self._task = Task("")
        self._viewer: Any = None

    def show(self, env: Env, world: int) -> None:
        """Show a world as it is now."""
        if env.tasks[world] != self._task:
            self._open(env.tasks[world])
        # The window's model has the same joints, but is not the one that is simulated.
        _, data = env.sim.snapshot(world)
        self._data.qpos = data.qpos
        self._data.qvel = data.qvel
        mujoco.mj_forward(self._model, self._data)
        self._viewer.render()

    def _open(self, task: Task) -> None:
        from gymnasium.envs.mujoco.mujoco_rendering import WindowViewer

        self.close()
        self._task = task
        self._model = self._task_models.compile(task)
        self._data = mujoco.MjData(self._model)
        self._viewer = WindowViewer(self._model, self._data, *self._size)

    def close(self) -> None:
        """Close the window."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
