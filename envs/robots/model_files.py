"""Robot models from files: reading them, and finding the elements they must have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mujoco

from metarobot.envs.robots import model_check
from metarobot.tasks.model_edits import ModelError, compile_spec


def read_gymnasium_model(file: str) -> mujoco.MjSpec:
    """Read one of the MJCF files that come with Gymnasium, such as ``ant.xml``."""
    # found without importing the package, which takes a third of a second
    package = importlib.util.find_spec("gymnasium")
    assert package is not None
    assert package.origin is not None
    assets = Path(package.origin).parent / "envs" / "mujoco" / "assets"
    return mujoco.MjSpec.from_file(str(assets / file))


def make_inertias_explicit(spec: mujoco.MjSpec) -> None:
    """Write the masses and inertias that follow from the geoms into the bodies.

    So each of them can be changed alone, and a payload adds to them.
    """
    nominal = compile_spec(spec)
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_AUTO
    for body in spec.bodies[1:]:
        compiled = nominal.body(body.name)
        body.explicitinertial = True
        body.mass = float(compiled.mass[0])
        body.ipos = compiled.ipos
        body.iquat = compiled.iquat
        body.inertia = compiled.inertia


def read_model(robot: str, category: str, example: str) -> mujoco.MjSpec:
    """Read the MJCF file of a robot, which a stranger may have made.

    A file given by its path is checked first (``model_check``): it may name files of its own folder
    alone, no plugins, and must compile within limits of time, memory and size.

    Args:
        robot: A path, or ``menagerie:name``.
        category: Category in MuJoCo Menagerie that the robot must belong to, such as ``arm``.
        example: A name in the Menagerie, for the error message.

    Raises:
        ModelError: There is no such file or name, it is refused, or MuJoCo does not read it.
    """
    is_published = robot.startswith("menagerie:")
    if is_published:
        path = _menagerie_path(robot.removeprefix("menagerie:"), category)
    else:
        path = Path(robot)
    if not path.is_file():
        raise ModelError(
            f"no robot model {robot!r}: give a path to an MJCF file, or menagerie:{example}"
        )
    try:
        if not is_published:
            identity = model_check.check_model_file(path)
            model_check.try_model(path, identity)
        return mujoco.MjSpec.from_file(str(path))
    except (ModelError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path} is no model that MuJoCo reads: {' '.join(str(e).split())}") from e


def _menagerie_path(name: str, category: str) -> Path:
    """Return the path of a model of MuJoCo Menagerie, downloaded by its own package."""
    try:
        import mujoco_menagerie
    except ImportError as e:
        raise ModelError(
            f"menagerie:{name} needs a package: pip install 'metarobot[menagerie]'"
        ) from e
    known = [r.name for r in mujoco_menagerie.robots(category)]
    if name not in known:
        raise ModelError(f"no {category} menagerie:{name}; there are: {', '.join(known)}")
    try:
        robot = mujoco_menagerie.get(name)
        return Path(robot.xml(robot.default_model))
    except mujoco_menagerie.MenagerieError as e:
        raise ModelError(f"menagerie:{name} cannot be had: {' '.join(str(e).split())}") from e


def find_elements(
    robot: str, kind: str, elements: Iterable[Any], wanted: Sequence[tuple[str, ...]]
) -> list[str]:
    """Return the names under which a model has the wanted elements.

    Args:
        robot: The model's name, for the error message.
        kind: What the elements are, for the error message.
        elements: The model's elements of this kind.
        wanted: For each wanted element the names it may have, the preferred one first.

    Raises:
        ModelError: Elements are missing; the message lists them and what the model has.
    """
    present = [element.name for element in elements if element.name]
    found = [next((n for n in names if n in present), "") for names in wanted]
    missing = [names[0] for names, name in zip(wanted, found, strict=True) if not name]
    if missing:
        raise ModelError(
            f"{robot} lacks the {kind}s {', '.join(missing)}; "
            f"it has: {', '.join(present) or 'none'}"
        )
    return found
