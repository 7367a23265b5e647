"""Pictures of worlds, each in the look of its task."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

import mujoco
import numpy as np

from metarobot.render.opengl import backend
from metarobot.render.scene import Pixels, Scene, apply_visual_style
from metarobot.sim.protocol import Sim
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels
from metarobot.types import Floats

_STAGES = 32
_MARK = (0.86, 0.1, 0.12, 1.0)


_STATE = mujoco.mjtState.mjSTATE_INTEGRATION.value


class FilmedWorlds(Protocol):
    """What a camera needs of an environment."""

    tasks: list[Task]
    sim: Sim


class Camera:
    """Takes pictures of a family's worlds from the side, each in the look of its own task,
    following the robot.

    Raises ``VideoError`` if there is no OpenGL here. Models are compiled once a task and kept.
    """

    def __init__(self, family: Family, width: int = 320, height: int = 240) -> None:
        backend()
        self.width, self.height = width, height
        self._family = family
        self._maker = TaskModels(family, visual=True, style=apply_visual_style)
        self._stages: dict[tuple[float, ...], Scene] = {}
        self._looks: dict[Hashable, tuple[float, Floats]] = {}

    def frame(self, env: FilmedWorlds, world: int) -> Pixels:
        """Take a picture of one world as it is now, ``(height, width, 3)`` uint8."""
        return self.picture(env.tasks[world], snapshot_state(env, world), key=world)

    def picture(self, task: Task, state: Floats, key: Hashable = None) -> Pixels:
        """Take a picture of a state (``snap``); states of one ``key`` are one take, over which the
        camera glides.
        """
        stage = self._stage(task)
        stage.load(state)
        return stage.draw(self._glide(stage, key))

    def _stage(self, task: Task) -> Scene:
        values = self._maker.key(task)
        if values not in self._stages:
            if len(self._stages) >= _STAGES:
                self.close()
            model = self._maker.compile(task)
            _mark(model, self._family.display.highlight(task.as_dict()))
            self._stages[values] = Scene(model, self.width, self.height, self._family.display.view)
        return self._stages[values]

    def _glide(self, stage: Scene, key: Hashable) -> Floats:
        """Follow with a lag of 0.2 s, at most a quarter of the robot, along the floor and 0.8 s in
        height.

        Cuts where time runs back.
        """
        time, goal = float(stage.data.time), stage.look()
        past, look = self._looks.get(key, (time, goal))
        if time < past or float(np.linalg.norm(goal - look)) > 2 * stage.radius:
            past, look = time, goal
        share = 1 - np.exp(-(time - past) / np.array([0.2, 0.2, 0.8]))
        look = look + share * (goal - look)
        look[:2] = goal[:2] - np.clip(goal[:2] - look[:2], -stage.radius / 4, stage.radius / 4)
        self._looks[key] = (time, look)
        return np.asarray(look)

    def close(self) -> None:
        """Free the pictures' memory; the next picture takes it anew."""
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mark(model: mujoco.MjModel, bodies: Iterable[str]) -> None:
    """Paint the shapes of bodies red."""
    names = [model.body(b).name for b in range(model.nbody)]
    geoms = np.isin(model.geom_bodyid, [names.index(b) for b in bodies if b in names])
    model.geom_matid[geoms], model.geom_rgba[geoms] = -1, _MARK


def snapshot_state(env: FilmedWorlds, world: int) -> Floats:
    """Copy all that a picture of one world depends on: a small vector, so that a trial is kept
    without its pixels.
    """
    model, data = env.sim.snapshot(world)
    state = np.empty(mujoco.mj_stateSize(model, _STATE))
    mujoco.mj_getState(model, data, state, _STATE)
    return state
