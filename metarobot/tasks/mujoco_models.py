"""From a nominal ``MjSpec`` and a task's edits to a compiled ``MjModel``: the compiled model is
what a task means.
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
OPS = ("set", "scale", "add", "rotate_y")


class ModelError(MetarobotError):
    """An edit that names nothing in the model, or a model that does not compile."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Where a task parameter goes in the model, and how it meets the nominal value there.

    ``op`` is ``set`` (value), ``scale`` (nominal × value), ``add`` (nominal + value), or
    ``rotate_y`` (the nominal 3-vector turned about the y axis by value degrees). Always from the
    nominal model, so edits never compound.
    """

    element: str
    """Kind of element: geom, body, joint, actuator, site or option."""
    name: str = ""
    """Name of the element; empty for ``option``."""
    field: str
    """Field of the element as ``MjSpec`` calls it, in MuJoCo's units."""
    index: int | None = None
    """Component of a vector field; None for a scalar, or for the whole vector of ``rotate_y``."""
    op: str = "set"

    def __post_init__(self) -> None:
        for value, allowed in ((self.element, ELEMENTS), (self.op, OPS)):
            if value not in allowed:
                raise ModelError(f"{value!r} is not one of: {', '.join(allowed)}")

    def describe(self) -> str:
        """Say in a few words what is changed, e.g. ``scale actuator bthigh gear[0]``."""
        index = "" if self.index is None else f"[{self.index}]"
        return " ".join(filter(None, (self.op, self.element, self.name, self.field + index)))


class ModelFactory:
    """Compiles a family's nominal model under any task's edits; made once, used for every task.

    ``visual=False`` drops what only a picture needs (a cheetah's model shrinks from 518 kB to 17
    kB), so that thousands of worlds can each have a model of their own.
    """

    def __init__(
        self,
        build: Callable[[], mujoco.MjSpec],
        edits: Iterable[Edit],
        *,
        shape: Callable[[mujoco.MjSpec, Mapping[str, float]], None] | None = None,
        visual: bool = False,
    ) -> None:
        self._spec, self._shape = build(), shape
        if not visual:
            strip(self._spec)
        self._slots = [_Slot(self._spec, edit) for edit in edits]

    def compile(
        self, values: Iterable[float], task: Mapping[str, float] | None = None
    ) -> mujoco.MjModel:
        """Compile the model in which each edit holds its value, in the order the edits were given.

        ``shape`` then writes what edits cannot say, from the task's values by name; it must set all
        that it touches.
        """
        for slot, value in zip(self._slots, values, strict=True):
            slot.write(value)
        if self._shape is not None and task is not None:
            self._shape(self._spec, task)
        return compile_spec(self._spec)


class _Slot:
    """One edit bound to its element, with the nominal value it starts from."""

    def __init__(self, spec: mujoco.MjSpec, edit: Edit) -> None:
        self.edit = edit
        self.target = find(spec, edit.element, edit.name)
        fields = _fields(self.target)
        if edit.field not in fields:
            raise ModelError(
                f"{edit.element} {edit.name!r} has no field {edit.field!r}; it has: {', '.join(fields)}"
            )
        self.nominal: Any = fields[edit.field]
        _check_index(edit, np.shape(self.nominal))

    def write(self, value: float) -> None:
        edit = self.edit
        if edit.op == "rotate_y":
            new: Any = _rotate_y(self.nominal, math.radians(value))
        else:
            base = float(self.nominal if edit.index is None else self.nominal[edit.index])
            new = {"set": value, "scale": base * value, "add": base + value}[edit.op]
        if edit.index is None:
            setattr(self.target, edit.field, new)
        else:
            getattr(self.target, edit.field)[edit.index] = new


def _fields(target: Any) -> dict[str, Any]:
    """Return the numeric fields of an element of a spec, vectors as copies."""
    values = {n: getattr(target, n) for n in dir(target) if not n.startswith("_")}
    return {
        n: np.copy(v) if np.ndim(v) else v
        for n, v in values.items()
        if isinstance(v, np.ndarray | float | int)
    }


def _check_index(edit: Edit, shape: tuple[int, ...]) -> None:
    if edit.op == "rotate_y":
        if shape != (3,) or edit.index is not None:
            raise ModelError(f"{edit.describe()}: only a whole 3-vector turns")
    elif not shape and edit.index is not None:
        raise ModelError(f"{edit.describe()}: {edit.field} is a single number and takes no index")
    elif shape and (edit.index is None or not 0 <= edit.index < shape[0]):
        raise ModelError(f"{edit.describe()}: {edit.field} needs an index from 0 to {shape[0] - 1}")


def find(spec: mujoco.MjSpec, element: str, name: str) -> Any:
    """Return the element of that name, or raise with the names that exist."""
    if element == "option":
        return spec.option
    found = getattr(spec, element)(name)
    if found is None:
        every = spec.bodies if element == "body" else getattr(spec, element + "s")
        names = ", ".join(e.name for e in every if e.name)
        raise ModelError(f"no {element} called {name!r}; there are: {names}")
    return found


def strip(spec: mujoco.MjSpec) -> None:
    """Remove textures, materials, lights, and files' meshes that touch nothing: they weigh
    megabytes and no force.
    """
    mesh = mujoco.mjtGeom.mjGEOM_MESH
    for geom in spec.geoms:
        geom.material = ""
        if (
            geom.type == mesh
            and not geom.contype
            and not geom.conaffinity
            and geom.parent.explicitinertial
        ):
            spec.delete(geom)
    used = {geom.meshname for geom in spec.geoms}
    for thing in [m for m in spec.meshes if m.file and m.name not in used]:
        spec.delete(thing)
    for thing in (*spec.materials, *spec.textures, *spec.lights):
        spec.delete(thing)


def compile_spec(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile, turning MuJoCo's complaint into one line and muting its deprecation notes about
    published models.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="compiler attribute", category=UserWarning)
        try:
            return spec.compile()
        except ValueError as e:
            raise ModelError(f"the model does not compile: {' '.join(str(e).split())}") from e


def _rotate_y(vector: Any, angle: float) -> list[float]:
    x, y, z = (float(v) for v in vector)
    c, s = math.cos(angle), math.sin(angle)
    return [c * x + s * z, y, c * z - s * x]
