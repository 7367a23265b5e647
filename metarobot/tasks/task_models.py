"""From a family's tasks to compiled models, shared where tasks differ in nothing the model
holds.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco

from metarobot.tasks.family import Family
from metarobot.tasks.mujoco_models import ModelFactory
from metarobot.tasks.space import Task


class TaskModels:
    """From a family's tasks to compiled models."""

    def __init__(
        self,
        family: Family,
        *,
        visual: bool = False,
        style: Callable[[mujoco.MjSpec], mujoco.MjSpec] = lambda s: s,
    ) -> None:
        params = family.space.params
        edits = [e for p in params for e in p.edits]
        self._columns = [i for i, p in enumerate(params) for _ in p.edits]
        self._shapes = [i for i, p in enumerate(params) if p.edits_spec]
        self._factory = ModelFactory(
            lambda: style(family.spec()), edits, shape=family.interaction.edit_spec, visual=visual
        )

    def key(self, task: Task) -> tuple[float, ...]:
        """Return the values that the model depends on: tasks that share them share a model."""
        return tuple(task.values[i][1] for i in (*self._columns, *self._shapes))

    @property
    def shared(self) -> bool:
        """Whether all tasks share one model: they differ in what the reward reads alone."""
        return not (self._columns or self._shapes)

    def compile(self, task: Task) -> mujoco.MjModel:
        """Compile the task's model."""
        return self._factory.compile((task.values[i][1] for i in self._columns), task.as_dict())
