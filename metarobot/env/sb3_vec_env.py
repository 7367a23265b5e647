"""Stable-Baselines3's face: its algorithms train over ``metarobot.env.base.Env`` at the speed of
the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from metarobot.env.base import Env
from metarobot.env.gymnasium_envs import (
    Array,
    Draw,
    camera,
    check_options,
    check_render_mode,
    family_of,
    spaces,
)
from metarobot.errors import MetarobotError
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task

try:
    from stable_baselines3 import PPO, SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as e:
    raise MetarobotError("Stable-Baselines3 is not installed: pip install 'metarobot[sb3]'") from e

__all__ = ["PPO", "SAC", "BaseCallback", "BaseFeaturesExtractor", "Logger", "SB3VecEnv"]

Indices = int | Iterable[int] | None


class SB3VecEnv(VecEnv):  # type: ignore[misc,unused-ignore]
    """Many worlds as one of SB3's ``VecEnv``, each with its own task, a new one at each autoreset.

    ``infos[i]``: task, name -> value, of the step; where an episode ended also
    terminal_observation, TimeLimit.truncated and episode (return r, length l, seconds since the
    start t), so no VecMonitor is needed. ``set_options({"task": ...})`` gives the next reset its
    tasks; with ``resample=False`` they stay. The worlds are rows of one batch, not environments
    with methods of their own: ``env_method`` knows ``render`` only.
    """

    def __init__(
        self,
        family: str | Family,
        num_envs: int,
        *,
        split: str = "train",
        seed: int = 0,
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
        self.draw, self.resample, self._size = Draw(family.space, split), resample, (width, height)
        self._rng, self._seed = np.random.default_rng(seed), seed
        tasks = [self.draw(seed, i, 0) for i in range(num_envs)]
        self.env = Env(family, tasks, threads=threads, resample=self._next_task)
        self.num_envs, self.render_mode = (
            num_envs,
            render_mode,
        )  # what SB3's constructor asks get_attr for
        super().__init__(num_envs, *spaces(self.env))
        self._camera: Any = None
        self._began = time.time()
        self._returns = np.zeros(num_envs)

    def reset(self) -> Array:
        """Start an episode in every world, with the seed and options given since the last reset."""
        first = self._seeds[0]
        self._seed, start_seed = (int(s) for s in self._generator(first).integers(2**63, size=2))
        self.env.set_tasks(
            [self._first_task(i, options) for i, options in enumerate(self._options)]
        )
        obs = self.env.reset(start_seed).numpy()
        self._returns[:] = 0.0
        self._tasks = [t.as_dict() for t in self.env.tasks]
        self.reset_infos = [{"task": t} for t in self._tasks]
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: Array) -> None:
        """Take the actions ``(world, act)``."""
        self._actions = torch.from_numpy(np.asarray(actions, np.float32))

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step every world; those that end are reset and given their next task."""
        lengths = self.env.elapsed + 1
        step = self.env.step(self._actions)
        reward, truncated = step.reward.numpy(), step.truncated.numpy()
        done = step.terminated.numpy() | truncated
        self._returns += reward
        infos: list[dict[str, Any]] = [{"task": t} for t in self._tasks]
        for i in np.flatnonzero(done).tolist():
            seconds = round(time.time() - self._began, 6)
            infos[i]["episode"] = {"r": float(self._returns[i]), "l": int(lengths[i]), "t": seconds}
            infos[i]["terminal_observation"] = step.final_obs[i].numpy().copy()
            infos[i]["TimeLimit.truncated"] = bool(truncated[i])
            self._tasks[i] = self.env.tasks[i].as_dict()
            self.reset_infos[i] = {"task": self._tasks[i]}
            self._returns[i] = 0.0
        return step.obs.numpy(), reward, done, infos

    def close(self) -> None:
        """Close the renderer."""
        close = getattr(self._camera, "close", None)
        self._camera = None
        if close is not None:
            close()

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return ``task`` of each world, or an attribute that all worlds share."""
        rows = list(self._get_indices(indices))
        if attr_name == "task":
            return [self.env.tasks[i].as_dict() for i in rows]
        return [getattr(self, attr_name)] * len(rows)

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Refuse: worlds have no attributes of their own."""
        raise MetarobotError(
            f"the worlds of a batch cannot be given {attr_name!r}; for tasks there is set_options()"
        )

    def env_method(
        self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any
    ) -> list[Any]:
        """Return each world's picture from ``render``; there are no other methods."""
        if method_name != "render":
            raise MetarobotError(
                f"the worlds of a batch have no method {method_name!r}; they have: render"
            )
        images = self.get_images()
        return [images[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """Say yes to ``Monitor``, whose statistics are in the infos."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Array | None]:
        """Return a picture ``(height, width, 3)`` uint8 of each world."""
        if self.render_mode is None:
            raise MetarobotError("there are no pictures without render_mode='rgb_array'")
        if self._camera is None:
            self._camera = camera(self.env.family, *self._size)
        return [self._camera.frame(self.env, i) for i in range(self.num_envs)]

    def _generator(self, seed: int | None) -> np.random.Generator:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        return self._rng

    def _first_task(self, world: int, options: dict[str, Any]) -> Task:
        options = check_options(options, ("task",))
        space = self.draw.space
        return (
            space.coerce(options["task"]) if "task" in options else self.draw(self._seed, world, 0)
        )

    def _next_task(self, world: int, episode: int) -> Task:
        return self.draw(self._seed, world, episode) if self.resample else self.env.tasks[world]
