"""From a family's tasks to compiled models."""

from __future__ import annotations

from collections.abc import Callable

import mujoco

from metarobot.tasks.family import Family
from metarobot.tasks.model_edits import ModelFactory
from metarobot.tasks.space import Task


class TaskModels:
    """Compiles the models of a family's tasks.

    Args:
        family: The family.
        visual: Whether to keep what only a picture needs.
        style: Changes the nominal specification, as for a picture.
    """

    def __init__(
        self,
        family: Family,
        *,
        visual: bool = False,
        style: Callable[[mujoco.MjSpec], mujoco.MjSpec] = lambda s: s,
    ) -> None:
        params = family.space.params
        edits = [edit for param in params for edit in param.edits]
        self._edited = [i for i, param in enumerate(params) for _ in param.edits]
        """Index of the parameter of each edit."""
        self._edits_spec = [i for i, param in enumerate(params) if param.edits_spec]
        self._factory = ModelFactory(
            lambda: style(family.spec()),
            edits,
            edit_spec=family.interaction.edit_spec,
            visual=visual,
        )

    def key(self, task: Task) -> tuple[float, ...]:
        """Return the values that the model depends on: tasks in which they agree share a model."""
        return tuple(task.values[i][1] for i in (*self._edited, *self._edits_spec))

    @property
    def shared(self) -> bool:
        """Whether all tasks have one model, as they differ in nothing but what the reward reads."""
        return not (self._edited or self._edits_spec)

    def compile(self, task: Task) -> mujoco.MjModel:
        """Compile the task's model.

        Raises:
            ModelError: It does not compile.
        """
        values = [task.values[i][1] for i in self._edited]
        return self._factory.compile(values, task.as_dict())
