"""Pictures of simulated worlds, each in the look of its task."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

import mujoco
import numpy as np

from metarobot.render.opengl import backend
from metarobot.render.scene import Pixels, Scene, apply_visual_style
from metarobot.sim.simulator import Sim
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.tasks.task_models import TaskModels
from metarobot.types import Floats

MOST_SCENES = 32
"""Scenes kept at a time; each holds memory of the graphics card."""
HIGHLIGHT_RGBA = (0.86, 0.1, 0.12, 1.0)
"""Colour of the bodies that a family highlights, such as broken limbs."""
FOLLOW_LAG_S = np.array([0.2, 0.2, 0.8])
"""Time constants with which the camera follows along x, y and z: slowest in height."""

STATE_SPEC = mujoco.mjtState.mjSTATE_INTEGRATION.value


class FilmedWorlds(Protocol):
    """What a camera needs of an environment."""

    tasks: list[Task]
    sim: Sim


class Camera:
    """Takes pictures of a family's worlds from the side, following the robot.

    Models are compiled once for each task and kept.
    """

    def __init__(self, family: Family, width: int = 320, height: int = 240) -> None:
        """Prepare to draw pictures of ``width`` times ``height`` pixels.

        Raises:
            VideoError: There is no OpenGL here.
        """
        backend()
        self.width = width
        self.height = height
        self._family = family
        self._task_models = TaskModels(family, visual=True, style=apply_visual_style)
        self._scenes: dict[tuple[float, ...], Scene] = {}
        self._followed: dict[Hashable, tuple[float, Floats]] = {}
        """Key of a recording -> time of its last picture (s), and the place it looked at."""

    def frame(self, env: FilmedWorlds, world: int) -> Pixels:
        """Take a picture of one world as it is now, ``(height, width, 3)`` uint8."""
        return self.picture(env.tasks[world], snapshot_state(env, world), key=world)

    def picture(self, task: Task, state: Floats, key: Hashable = None) -> Pixels:
        """Take a picture of a state, as ``snapshot_state`` copies it, ``(height, width, 3)`` uint8.

        States of one ``key`` are one recording, during which the camera moves smoothly.
        """
        scene = self._scene(task)
        scene.load(state)
        return scene.draw(self._follow(scene, key))

    def _scene(self, task: Task) -> Scene:
        """Return the scene of a task, made if it is not there yet."""
        model_key = self._task_models.key(task)
        if model_key not in self._scenes:
            if len(self._scenes) >= MOST_SCENES:
                self.close()
            model = self._task_models.compile(task)
            _highlight(model, self._family.display.highlight(task.as_dict()))
            view = self._family.display.view
            self._scenes[model_key] = Scene(model, self.width, self.height, view)
        return self._scenes[model_key]

    def _follow(self, scene: Scene, key: Hashable) -> Floats:
        """Return the place to look at: that of the robot, followed with a lag.

        The camera lags at most a quarter of the robot's radius along the floor. It jumps where time
        runs back, and where the robot is suddenly elsewhere.
        """
        time = float(scene.data.time)
        goal = scene.look()
        last_time, last_look = self._followed.get(key, (time, goal))
        jumped = float(np.linalg.norm(goal - last_look)) > 2 * scene.radius
        if time < last_time or jumped:
            last_time = time
            last_look = goal

        # First-order lag: the share of the way that is made up for in the time between.
        share = 1 - np.exp(-(time - last_time) / FOLLOW_LAG_S)
        look = last_look + share * (goal - last_look)
        most = scene.radius / 4
        look[:2] = goal[:2] - np.clip(goal[:2] - look[:2], -most, most)
        self._followed[key] = (time, look)
        return np.asarray(look)

    def close(self) -> None:
        """Free the memory of the graphics card; the next picture takes it anew."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _highlight(model: mujoco.MjModel, bodies: Iterable[str]) -> None:
    """Paint the geoms of the named bodies in the colour of highlights."""
    names = [model.body(body).name for body in range(model.nbody)]
    ids = [names.index(body) for body in bodies if body in names]
    geoms = np.isin(model.geom_bodyid, ids)
    model.geom_matid[geoms] = -1  # a material would hide the colour
    model.geom_rgba[geoms] = HIGHLIGHT_RGBA


def snapshot_state(env: FilmedWorlds, world: int) -> Floats:
    """Copy the state of one world, a vector of all that a picture depends on.

    It is small, so that a whole trial is kept without its pixels.
    """
    model, data = env.sim.snapshot(world)
    state = np.empty(mujoco.mj_stateSize(model, STATE_SPEC))
    mujoco.mj_getState(model, data, state, STATE_SPEC)
    return state
