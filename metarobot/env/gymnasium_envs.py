"""Gymnasium's face: ``GymEnv`` is one world, ``GymVecEnv`` many, both over
``metarobot.env.base.Env``.

Every family has the id ``metarobot/<Name>-v0``, for ``gymnasium.make`` and ``gymnasium.make_vec``.
A task is an option of ``reset``; without it each episode draws a new one. ``info["task"]`` is the
task that the observation belongs to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

import metarobot
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.tasks.distributions import TaskError
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Task, TaskSpace
from metarobot.tasks.task_models import TaskModels

Array = NDArray[Any]
RENDER_MODES = ("human", "rgb_array")


def register() -> None:
    """Give every family its Gymnasium id; ``import metarobot`` does it for those that come by entry
    points.
    """
    metarobot._register(families.names())


class Draw:
    """Draws one task at a time from a split, reproducibly from a key of integers."""

    def __init__(self, space: TaskSpace, split: str) -> None:
        space.check_split(split)
        self.space = space
        # a finite space's test split lists all tasks in order: drawing one at a time would always
        # give the first
        self.split = "train" if split == "test" and space.finite else split

    def __call__(self, *key: int) -> Task:
        """Draw the task of this key."""
        return self.space.sample(self.split, 1, key)[0]


def family_of(family: str | Family) -> Family:
    """Take a family as it is or by name."""
    return families.get(family) if isinstance(family, str) else family


def spaces(env: Env) -> tuple[Box, Box]:
    """Return observation and action space of one world, float32."""
    low, high = env.action_low.float().numpy(), env.action_high.float().numpy()
    return Box(-np.inf, np.inf, (env.obs_dim,), np.float32), Box(low, high, dtype=np.float32)


def check_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """Return reset's options, or raise with those that exist."""
    options = dict(options or {})
    for name in options:
        if name not in known:
            raise MetarobotError(f"reset has no option {name!r}; it has: {', '.join(known)}")
    return options


def as_tasks(space: TaskSpace, value: object, worlds: int) -> list[Task]:
    """Check tasks given as one for all worlds or as a list of one a world."""
    if isinstance(value, Task | Mapping):
        return [space.coerce(value)] * worlds
    if not isinstance(value, Sequence) or len(value) != worlds:
        raise TaskError(
            f"{worlds} worlds take one {space.name} task or a list of {worlds}, not {value!r}"
        )
    return [space.coerce(v) for v in value]


def as_actions(action: object, shape: tuple[int, ...]) -> Tensor:
    """Check the shape of an action and make it a float32 tensor."""
    array = np.asarray(action, np.float32)
    if array.shape != shape:
        raise MetarobotError(f"an action here has shape {shape}, not {array.shape}")
    return torch.from_numpy(array)


def check_render_mode(mode: str | None, known: Sequence[str]) -> None:
    """Raise unless pictures of that kind can be had here."""
    if mode is not None and mode not in known:
        raise MetarobotError(f"no render mode {mode!r}; there are: {', '.join(known)}")
    no_display = sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if mode == "human" and no_display:
        raise MetarobotError(
            "render_mode='human' needs a display and there is none: take render_mode='rgb_array'"
        )


class GymEnv(gymnasium.Env[Array, Array]):
    """One world. Its task is drawn from ``split`` at each reset, unless ``options={"task": ...}``
    names it.

    An episode ends by itself after the family's horizon; the last observation is the one the last
    step led to. ``info``: task, name -> value; reward_terms, name -> value before its weight;
    faulted, whether the physics broke.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 20}  # noqa: RUF012 (Gymnasium's type)

    def __init__(
        self,
        family: str | Family,
        *,
        split: str = "train",
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
    ) -> None:
        check_render_mode(render_mode, RENDER_MODES)
        family = family_of(family)
        self.draw = Draw(family.space, split)
        self.env = Env(family, [self.draw(0)], threads=1, resample=self._keep_last_frame)
        self.metadata = {**self.metadata, "render_fps": round(self.env.control_hz)}
        self.observation_space, self.action_space = spaces(self.env)
        self.render_mode, self._size = render_mode, (width, height)
        self._over = True
        self._painter: Any = None
        self._last_frame: Array | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode; options: ``task``."""
        options = check_options(options, ("task",))
        given = self.draw.space.coerce(options["task"]) if "task" in options else None
        super().reset(seed=seed)
        task_seed, start_seed = (int(s) for s in self.np_random.integers(2**63, size=2))
        self.env.set_tasks([given or self.draw(task_seed)])
        obs = self.env.reset(start_seed)[0].numpy()
        self._over, self._last_frame = False, None
        if self.render_mode == "human":
            self._paint()
        return obs, {"task": self.env.tasks[0].as_dict()}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Advance by one control step."""
        if self._over:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        step = self.env.step(as_actions(action, self.action_space.shape or ())[None])
        terminated, truncated = bool(step.terminated[0]), bool(step.truncated[0])
        self._over = terminated or truncated
        if self.render_mode == "human" and not self._over:
            self._paint()
        info = {
            "task": self.env.tasks[0].as_dict(),
            "reward_terms": {k: float(v[0]) for k, v in step.terms.items()},
            "faulted": bool(step.faulted[0]),
        }
        return step.final_obs[0].numpy(), float(step.reward[0]), terminated, truncated, info

    def render(self) -> Array | None:
        """Return a picture ``(height, width, 3)`` uint8 in mode ``rgb_array``; ``human`` draws by
        itself.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() draws nothing without a render_mode, e.g. render_mode='rgb_array'"
            )
        if self.render_mode != "rgb_array":
            return None
        return self._paint() if self._last_frame is None else self._last_frame

    def close(self) -> None:
        """Close the window or the renderer."""
        close = getattr(self._painter, "close", None)
        self._painter = None
        if close is not None:
            close()

    def _paint(self) -> Array | None:
        if self._painter is None and self.render_mode == "human":
            self._painter = _Window(self.env.family, *self._size)
        elif self._painter is None:
            self._painter = camera(self.env.family, *self._size)
        frame: Array | None = self._painter.frame(self.env, 0)
        return frame

    def _keep_last_frame(self, world: int, episode: int) -> Task:
        # the engine is about to start the next episode, which render() must not show before reset()
        if self.render_mode is not None:
            self._last_frame = self._paint()
        return self.env.tasks[world]


class GymVecEnv(gymnasium.vector.VectorEnv[Array, Array, Array]):
    """Many worlds stepped together, each with its own task, reset in the step that ends an episode.

    A world gets a new task from ``split`` at each autoreset, unless ``resample`` is false. Worlds
    are independent: what one lives depends on the seed, its index and its actions. ``infos`` are
    Gymnasium's arrays with masks, as GymEnv's; where an episode ended, ``final_obs`` and
    ``final_info`` belong to the old task, ``task`` to the new one, and ``reward_terms`` go with the
    reward returned.
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
        threads: int = 0,
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
    ) -> None:
        check_render_mode(render_mode, ("rgb_array",))
        if num_envs < 1:
            raise MetarobotError(f"num_envs must be at least 1, not {num_envs}")
        family = family_of(family)
        self.draw, self.resample, self._keep, self._seed = (
            Draw(family.space, split),
            resample,
            not resample,
            0,
        )
        tasks = [self.draw(0, i, 0) for i in range(num_envs)]
        self.env = Env(family, tasks, threads=threads, resample=self._next_task)
        self.metadata = {**self.metadata, "render_fps": round(self.env.control_hz)}
        self.num_envs, self.render_mode, self._size = num_envs, render_mode, (width, height)
        self.single_observation_space, self.single_action_space = spaces(self.env)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._all, self._started = np.ones(num_envs, bool), False
        self._camera: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode in every world.

        Options: ``task``, one for all worlds or a list of one a world, for their first episode;
        ``resample``, to keep (False) or change (True) tasks at the autoresets until the next reset.
        """
        options = check_options(options, self.OPTIONS)
        given = (
            as_tasks(self.draw.space, options["task"], self.num_envs) if "task" in options else None
        )
        super().reset(seed=seed)
        self._seed, start_seed = (int(s) for s in self.np_random.integers(2**63, size=2))
        self._keep = not options.get("resample", self.resample)
        self.env.set_tasks(given or [self.draw(self._seed, i, 0) for i in range(self.num_envs)])
        obs = self.env.reset(start_seed).numpy()
        self._started, self._tasks = True, self._task_info()
        return obs, masked({"task": self._tasks}, self._all)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Advance every world by one control step; those that end are reset and given their next
        task.
        """
        if not self._started:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        step = self.env.step(as_actions(actions, self.action_space.shape or ()))
        terminated, truncated = step.terminated.numpy().copy(), step.truncated.numpy()
        done = terminated | truncated
        infos: dict[str, Any] = {
            "reward_terms": {k: v.double().numpy().copy() for k, v in step.terms.items()},
            "faulted": step.faulted.numpy(),
        }
        if done.any():
            final = masked({**infos, "task": self._tasks}, done)
            self._tasks = self._task_info()
            infos |= {"final_obs": _rows(step.final_obs.numpy(), done), "_final_obs": done}
            infos |= {"final_info": final, "_final_info": done}
        infos |= masked(
            {k: infos[k] for k in ("reward_terms", "faulted")} | {"task": self._tasks}, self._all
        )
        return step.obs.numpy(), step.reward.numpy(), terminated, truncated, infos

    def render(self) -> tuple[Array, ...] | None:
        """Return a picture ``(height, width, 3)`` uint8 of each world."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() draws nothing without render_mode='rgb_array'")
            return None
        if self._camera is None:
            self._camera = camera(self.env.family, *self._size)
        return tuple(self._camera.frame(self.env, i) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Close the renderer."""
        close = getattr(self._camera, "close", None)
        self._camera = None
        if close is not None:
            close()

    def _next_task(self, world: int, episode: int) -> Task:
        return self.env.tasks[world] if self._keep else self.draw(self._seed, world, episode)

    def _task_info(self) -> dict[str, Array]:
        return {k: v.numpy().copy() for k, v in self.env.task_values.items()}


def masked(info: Mapping[str, Any], mask: Array) -> dict[str, Any]:
    """Lay out arrays ``(world, ...)`` as Gymnasium's infos: zero outside the mask, each beside its
    ``_name`` mask.
    """
    out: dict[str, Any] = {}
    for name, value in info.items():
        nested = isinstance(value, Mapping)
        out[name] = (
            masked(value, mask)
            if nested
            else value
            if mask.all()
            else np.where(mask, value, 0).astype(value.dtype)
        )
        out["_" + name] = mask.copy()
    return out


def _rows(array: Array, mask: Array) -> Array:
    out = np.full(len(array), None, object)
    for i in np.flatnonzero(mask):
        out[i] = array[i].copy()
    return out


def camera(family: Family, width: int, height: int) -> Any:
    """Open an off-screen renderer; imported late, as it looks for a way to draw."""
    from metarobot.render.camera import Camera

    return Camera(family, width, height)


class _Window:
    """A window on one world, drawn by Gymnasium's MuJoCo viewer from a model that has its textures
    and lights.
    """

    def __init__(self, family: Family, width: int, height: int) -> None:
        self._maker = TaskModels(family, visual=True)
        self._size, self._task = (width, height), Task("")
        self._viewer: Any = None

    def frame(self, env: Env, world: int) -> None:
        """Show a world as it is now."""
        if env.tasks[world] != self._task:
            self._open(env.tasks[world])
        data = env.sim.snapshot(world)[1]
        self._data.qpos, self._data.qvel = data.qpos, data.qvel
        mujoco.mj_forward(self._model, self._data)
        self._viewer.render()

    def _open(self, task: Task) -> None:
        from gymnasium.envs.mujoco.mujoco_rendering import WindowViewer

        self.close()
        self._task = task
        self._model = self._maker.compile(task)
        self._data = mujoco.MjData(self._model)
        self._viewer = WindowViewer(self._model, self._data, *self._size)

    def close(self) -> None:
        """Close the window."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
