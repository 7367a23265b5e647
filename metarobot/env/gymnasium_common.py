"""What the Gymnasium and Stable-Baselines3 environments share: worlds, tasks and pictures."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from metarobot.env.base import Env
from metarobot.env.factory import make_env
from metarobot.errors import MetarobotError
from metarobot.tasks.distributions import TaskError
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Task, TaskSpace

if TYPE_CHECKING:
    from metarobot.render.camera import Camera

Array = NDArray[Any]


class TaskSampler:
    """Draws one task at a time from a split, reproducibly from a key of integers."""

    def __init__(self, space: TaskSpace, split: str) -> None:
        space.check_split(split)
        self.space = space
        # The test split of a finite space lists all its tasks in order, so drawing one at a time
        # would always give the first. The same tasks are drawn at random in the train split.
        self.split = "train" if split == "test" and space.finite else split

    def __call__(self, *key: int) -> Task:
        """Draw the task of this key."""
        return self.space.sample(self.split, 1, key)[0]


class WorldSet:
    """The worlds behind a Gymnasium or SB3 environment, on any simulator, with their camera.

    Args:
        family: A family or its name.
        num_envs: Number of worlds.
        split: The split of the task space that tasks are drawn from.
        sim: ``cpu`` or ``warp``, see ``make_env``.
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        threads: Threads of MuJoCo on the CPU; 0 takes all there are.
        width: Width of a picture in pixels.
        height: Height of a picture in pixels.

    Raises:
        MetarobotError: An unknown family, split or simulator, or no worlds.
    """

    def __init__(
        self,
        family: str | Family,
        num_envs: int,
        *,
        split: str,
        sim: str,
        device: str,
        threads: int,
        width: int,
        height: int,
    ) -> None:
        if num_envs < 1:
            raise MetarobotError(f"num_envs must be at least 1, not {num_envs}")
        family = families.get(family) if isinstance(family, str) else family
        self.sample_task = TaskSampler(family.space, split)
        tasks = [self.sample_task(0, i, 0) for i in range(num_envs)]
        self.env: Env = make_env(family, tasks, sim=sim, device=device, threads=threads)
        self._size = (width, height)
        self._camera: Camera | None = None

    def spaces(self) -> tuple[Box, Box]:
        """Return observation and action space of one world, float32."""
        low = to_numpy(self.env.action_low.float())
        high = to_numpy(self.env.action_high.float())
        observations = Box(-np.inf, np.inf, (self.env.obs_dim,), np.float32)
        return observations, Box(low, high, dtype=np.float32)

    def picture(self, world: int) -> Array:
        """Return a picture of one world ``(height, width, 3)`` uint8."""
        if self._camera is None:
            self._camera = open_camera(self.env.family, *self._size)
        return self._camera.frame(self.env, world)

    def pictures(self) -> list[Array]:
        """Return a picture ``(height, width, 3)`` uint8 of each world."""
        return [self.picture(world) for world in range(self.env.worlds)]

    def close(self) -> None:
        """Close the camera, if there is one."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None


def open_camera(family: Family, width: int, height: int) -> Camera:
    """Open an off-screen renderer; it is imported late, as it looks for a way to draw."""
    from metarobot.render.camera import Camera

    return Camera(family, width, height)


def to_numpy(x: Tensor) -> Array:
    """Return a tensor of any device as an array."""
    array: Array = x.cpu().numpy()
    return array


def check_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """Return the options of ``reset``.

    Raises:
        MetarobotError: An option that does not exist.
    """
    checked = dict(options or {})
    for name in checked:
        if name not in known:
            raise MetarobotError(f"reset has no option {name!r}; it has: {', '.join(known)}")
    return checked


def parse_tasks(space: TaskSpace, value: object, worlds: int) -> list[Task]:
    """Check tasks given as one for all worlds or as a list of one a world.

    Raises:
        TaskError: Another number of tasks, or one that is not of this space.
    """
    if isinstance(value, Task | Mapping):
        return [space.coerce(value)] * worlds
    if not isinstance(value, Sequence) or len(value) != worlds:
        raise TaskError(
            f"{worlds} worlds take one {space.name} task or a list of {worlds}, not {value!r}"
        )
    return [space.coerce(v) for v in value]


def parse_action(action: object, shape: tuple[int, ...]) -> Tensor:
    """Make an action a float32 tensor.

    Raises:
        MetarobotError: It has another shape.
    """
    array = np.asarray(action, np.float32)
    if array.shape != shape:
        raise MetarobotError(f"an action here has shape {shape}, not {array.shape}")
    return torch.from_numpy(array)


def check_render_mode(mode: str | None, known: Sequence[str]) -> None:
    """Check that pictures of that kind can be drawn here.

    Raises:
        MetarobotError: An unknown mode, or ``human`` without a display.
    """
    if mode is not None and mode not in known:
        raise MetarobotError(f"no render mode {mode!r}; there are: {', '.join(known)}")
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if mode == "human" and sys.platform == "linux" and not has_display:
        raise MetarobotError(
            "render_mode='human' needs a display and there is none: take render_mode='rgb_array'"
        )
