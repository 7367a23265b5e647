"""Stable-Baselines3's vector environment, so that its algorithms train over the whole batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.gymnasium_common import (
    Array,
    WorldSet,
    check_options,
    check_render_mode,
    to_numpy,
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
"""Which worlds: one, several, or all (None)."""


class SB3VecEnv(VecEnv):  # type: ignore[misc,unused-ignore]
    """Many worlds as one ``VecEnv``, each on its own task, a new one at each autoreset.

    ``infos[i]``: task, name -> value, of the step; where an episode ended also
    terminal_observation, TimeLimit.truncated and episode (return r, length l, seconds since the
    start t), so no VecMonitor is needed. ``set_options({"task": ...})`` gives the next reset its
    tasks; with ``resample=False`` they stay. The worlds are rows of one batch, not environments
    with methods of their own: ``env_method`` knows ``render`` only.

    Args:
        family: A family or its name.
        num_envs: Number of worlds.
        split: The split of the task space that tasks are drawn from.
        seed: Keys tasks and starts until ``seed()`` gives another.
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

    def __init__(
        self,
        family: str | Family,
        num_envs: int,
        *,
        split: str = "train",
        seed: int = 0,
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
        self._rng = np.random.default_rng(seed)
        self._seed = seed

        # SB3's constructor asks get_attr for the render mode, so it must be there before.
        self.num_envs = num_envs
        self.render_mode = render_mode
        super().__init__(num_envs, *self._worlds.spaces())
        self._began = time.time()
        self._returns = np.zeros(num_envs)

    def reset(self) -> Array:
        """Start an episode in every world; return the observations ``(world, obs)``.

        The seed and the options given since the last reset take effect.
        """
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
        self._seed, start_seed = (int(s) for s in self._rng.integers(2**63, size=2))
        tasks = [self._first_task(i, options) for i, options in enumerate(self._options)]
        self.env.set_tasks(tasks)
        obs = to_numpy(self.env.reset(start_seed))

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
        """Step every world and restart those whose episode ended; return obs, reward, done, infos.

        Shapes: ``(world, obs)``, ``(world,)``, ``(world,)`` and a list of one dictionary a world.
        """
        lengths = self.env.elapsed + 1  # counted here, as a restart sets them back to 0
        step = self._autoreset.step(self._actions)
        reward = to_numpy(step.reward)
        truncated = to_numpy(step.truncated)
        done = to_numpy(step.terminated) | truncated
        self._returns += reward

        infos: list[dict[str, Any]] = [{"task": t} for t in self._tasks]
        for i in np.flatnonzero(done).tolist():
            infos[i]["episode"] = {
                "r": float(self._returns[i]),
                "l": int(lengths[i]),
                "t": round(time.time() - self._began, 6),
            }
            infos[i]["terminal_observation"] = to_numpy(step.final_obs[i]).copy()
            infos[i]["TimeLimit.truncated"] = bool(truncated[i])
            infos[i]["faulted"] = bool(step.faulted[i])
            self._tasks[i] = self.env.tasks[i].as_dict()
            self.reset_infos[i] = {"task": self._tasks[i]}
            self._returns[i] = 0.0
        return to_numpy(step.obs), reward, done, infos

    def close(self) -> None:
        """Close the renderer."""
        self._worlds.close()

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
        """Return a picture ``(height, width, 3)`` uint8 of each world.

        Raises:
            MetarobotError: The environment was made without a render mode.
        """
        if self.render_mode is None:
            raise MetarobotError("there are no pictures without render_mode='rgb_array'")
        return self._worlds.pictures()

    def _first_task(self, world: int, options: dict[str, Any]) -> Task:
        options = check_options(options, ("task",))
        if "task" in options:
            return self.env.family.space.coerce(options["task"])
        return self._worlds.sample_task(self._seed, world, 0)

    def _next_task(self, world: int, episode: int) -> Task:
        if not self.resample:
            return self.env.tasks[world]
        return self._worlds.sample_task(self._seed, world, episode)
