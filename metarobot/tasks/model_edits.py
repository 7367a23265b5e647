"""From a nominal ``MjSpec`` and a task's edits to a compiled ``MjModel``.

The compiled model is what a task means: MuJoCo computes every derived constant from the edited
specification.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from metarobot.errors import MetarobotError

ELEMENTS = ("geom", "body", "joint", "actuator", "site", "option")
"""Kinds of elements that edits may change."""
OPS = ("set", "scale", "add", "rotate_y")
"""Operations of edits."""


class ModelError(MetarobotError):
    """An edit that names nothing in the model, or a model that does not compile."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Where a task parameter enters the model, and how it is combined with the nominal value.

    Every edit starts from the nominal model, so edits never compound.

    Raises:
        ModelError: An unknown kind of element or operation.
    """

    element: str
    """Kind of element: geom, body, joint, actuator, site or option."""
    name: str = ""
    """Name of the element; empty for an option."""
    field: str
    """Field of the element as ``MjSpec`` calls it, in MuJoCo's units."""
    index: int | None = None
    """Component of a vector field; None for a scalar, or for the whole vector of ``rotate_y``."""
    op: str = "set"
    """``set`` (value), ``scale`` (nominal × value), ``add`` (nominal + value), or ``rotate_y`` (the
    nominal 3-vector turned about the y axis by value degrees)."""

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ModelError(f"{self.element!r} is not one of: {', '.join(ELEMENTS)}")
        if self.op not in OPS:
            raise ModelError(f"{self.op!r} is not one of: {', '.join(OPS)}")

    def describe(self) -> str:
        """Return what is changed for people, e.g. ``scale actuator bthigh gear[0]``."""
        index = "" if self.index is None else f"[{self.index}]"
        return " ".join(filter(None, (self.op, self.element, self.name, self.field + index)))


class ModelFactory:
    """Compiles a family's nominal model under any task's edits; made once, used for every task.

    Args:
        build: Builds the nominal specification.
        edits: The edits, in the order in which ``compile`` takes their values.
        edit_spec: (spec, task values by name): writes what edits cannot express; it must set
            everything that it ever changes.
        visual: Whether to keep what only a picture needs. Without it a cheetah's model shrinks from
            518 kB to 17 kB, so that thousands of worlds can each have a model of their own.

    Raises:
        ModelError: An edit that names nothing in the model.
    """

    def __init__(
        self,
        build: Callable[[], mujoco.MjSpec],
        edits: Iterable[Edit],
        *,
        edit_spec: Callable[[mujoco.MjSpec, Mapping[str, float]], None] | None = None,
        visual: bool = False,
    ) -> None:
        self._spec = build()
        self._edit_spec = edit_spec
        if not visual:
            strip(self._spec)
        self._targets = [_EditTarget(self._spec, edit) for edit in edits]

    def compile(
        self, values: Iterable[float], task: Mapping[str, float] | None = None
    ) -> mujoco.MjModel:
        """Compile the model of a task.

        Args:
            values: One value for each edit, in their order.
            task: Task values by name, for ``edit_spec``.

        Raises:
            ModelError: The model does not compile.
        """
        # One specification is edited again and again: every edit writes an absolute value, so
        # nothing is left of the task before.
        for target, value in zip(self._targets, values, strict=True):
            target.write(value)
        if self._edit_spec is not None and task is not None:
            self._edit_spec(self._spec, task)
        return compile_spec(self._spec)


class _EditTarget:
    """An edit with the element that it changes and the nominal value that it starts from."""

    def __init__(self, spec: mujoco.MjSpec, edit: Edit) -> None:
        self._edit = edit
        self._element = find(spec, edit.element, edit.name)
        fields = _numeric_fields(self._element)
        if edit.field not in fields:
            raise ModelError(
                f"{edit.element} {edit.name!r} has no field {edit.field!r}; "
                f"it has: {', '.join(fields)}"
            )
        self._nominal: Any = fields[edit.field]
        _check_index(edit, np.shape(self._nominal))

    def write(self, value: float) -> None:
        """Write what the edit makes of the nominal value and a task's value."""
        edit = self._edit
        new: Any
        if edit.op == "rotate_y":
            new = _rotate_y(self._nominal, math.radians(value))
        else:
            nominal = float(self._nominal if edit.index is None else self._nominal[edit.index])
            new = {"set": value, "scale": nominal * value, "add": nominal + value}[edit.op]

        if edit.index is None:
            setattr(self._element, edit.field, new)
        else:
            getattr(self._element, edit.field)[edit.index] = new


def _numeric_fields(element: Any) -> dict[str, Any]:
    """Return the numeric fields of an element of a spec, vectors as copies."""
    fields = {}
    for name in dir(element):
        if name.startswith("_"):
            continue
        value = getattr(element, name)
        if isinstance(value, np.ndarray | float | int):
            fields[name] = np.copy(value) if np.ndim(value) else value
    return fields


def _check_index(edit: Edit, shape: tuple[int, ...]) -> None:
    if edit.op == "rotate_y":
        if shape != (3,) or edit.index is not None:
            raise ModelError(f"{edit.describe()}: only a whole 3-vector turns")
    elif not shape and edit.index is not None:
        raise ModelError(f"{edit.describe()}: {edit.field} is a single number and takes no index")
    elif shape and (edit.index is None or not 0 <= edit.index < shape[0]):
        raise ModelError(f"{edit.describe()}: {edit.field} needs an index from 0 to {shape[0] - 1}")


def find(spec: mujoco.MjSpec, element: str, name: str) -> Any:
    """Return the element of that name; ``option`` needs none.

    Raises:
        ModelError: There is no such element.
    """
    if element == "option":
        return spec.option
    found = getattr(spec, element)(name)
    if found is None:
        elements = spec.bodies if element == "body" else getattr(spec, element + "s")
        names = ", ".join(e.name for e in elements if e.name)
        raise ModelError(f"no {element} called {name!r}; there are: {names}")
    return found


def strip(spec: mujoco.MjSpec) -> None:
    """Remove textures, materials, lights, and meshes that collide with nothing.

    They take megabytes and exert no force.
    """
    for geom in spec.geoms:
        geom.material = ""
        is_mesh = geom.type == mujoco.mjtGeom.mjGEOM_MESH
        collides = geom.contype or geom.conaffinity
        # Without an explicit inertia the mesh gives its body its mass.
        if is_mesh and not collides and geom.parent.explicitinertial:
            spec.delete(geom)

    used = {geom.meshname for geom in spec.geoms}
    for mesh in [m for m in spec.meshes if m.file and m.name not in used]:
        spec.delete(mesh)
    for asset in (*spec.materials, *spec.textures, *spec.lights):
        spec.delete(asset)


def compile_spec(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile, with MuJoCo's deprecation warnings about published models suppressed.

    Raises:
        ModelError: The model does not compile; MuJoCo's message in one line.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="compiler attribute", category=UserWarning)
        try:
            return spec.compile()
        except ValueError as e:
            raise ModelError(f"the model does not compile: {' '.join(str(e).split())}") from e


def _rotate_y(vector: Any, angle: float) -> list[float]:
    """Rotate a 3-vector about the y axis by an angle in rad."""
    x, y, z = (float(v) for v in vector)
    cos = math.cos(angle)
    sin = math.sin(angle)
    return [cos * x + sin * z, y, cos * z - sin * x]
