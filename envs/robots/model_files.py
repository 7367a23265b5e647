"""Other people's models of robots: found, read, and asked for what they must have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mujoco

from metarobot.tasks.mujoco_models import ModelError


def read(robot: str, category: str, example: str) -> mujoco.MjSpec:
    """Read an MJCF: ``robot`` is a path or ``menagerie:name`` of that category, ``example`` a name
    for the error.
    """
    path = (
        _menagerie(robot.removeprefix("menagerie:"), category)
        if robot.startswith("menagerie:")
        else Path(robot)
    )
    if not path.is_file():
        raise ModelError(
            f"no robot model {robot!r}: give a path to an MJCF file, or menagerie:{example}"
        )
    try:
        return mujoco.MjSpec.from_file(str(path))
    except ValueError as e:
        raise ModelError(f"{path} is no model that MuJoCo reads: {' '.join(str(e).split())}") from e


def _menagerie(name: str, category: str) -> Path:
    """Find a model of MuJoCo Menagerie, downloaded by its own package."""
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


def named(
    robot: str, kind: str, elements: Iterable[Any], wanted: Iterable[tuple[str, ...]]
) -> list[str]:
    """Find each element under one of its names, or say all that is missing and all there is."""
    there, wanted = [e.name for e in elements if e.name], list(wanted)
    found = [next((n for n in names if n in there), "") for names in wanted]
    missing = [names[0] for names, n in zip(wanted, found, strict=True) if not n]
    if missing:
        raise ModelError(
            f"{robot} lacks the {kind}s {', '.join(missing)}; it has: {', '.join(there) or 'none'}"
        )
    return found
