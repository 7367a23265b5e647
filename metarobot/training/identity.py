"""What a run was made from: hashes of its robot, demonstrations and model, version and threads.

They are written into ``config.json`` when a run begins, and compared when it is used: what has
changed since then is told in one line. Whether the task space is still the same is checked apart,
since then nothing of the run could be used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metarobot.bridge.policy.checked_json import BadValueError, read_regular_file
from metarobot.tasks.family import Family
from metarobot.training.config import TrainConfig
from metarobot.training.run_files import MadeFrom, read_made_from
from metarobot.training.run_folder import Run

MAX_MODEL_BYTES = 1_000_000_000
MAX_MODEL_FILES = 10_000
CHUNK_BYTES = 1 << 20
UNREADABLE = ""
"""Hash of what cannot be read; it is compared with nothing."""

_FOLDER_ATTRIBUTES = ("meshdir", "texturedir", "assetdir")
_MACHINE_PATH = re.compile(r' (?:meshdir|texturedir|assetdir|file)="[^"]*"')

_log = logging.getLogger("metarobot")


def thread_count(config: TrainConfig) -> int:
    """Return the CPU threads that a training uses here."""
    return config.threads or len(os.sched_getaffinity(0))


def describe_origin(config: TrainConfig, family: Family) -> dict[str, Any]:
    """Return what a run is made from, as JSON data for ``config.json``."""
    return asdict(
        MadeFrom(
            robot=robot_digest(config.robot),
            demos=folder_digest(Path(config.demos)) if config.demos else UNREADABLE,
            model=model_digest(family),
            threads=thread_count(config),
        )
    )


def origin_differences(run: Run, *, other_robot: bool = False, training: bool = False) -> list[str]:
    """Return what a run was made from that is different here; nothing for runs of format 1.

    Args:
        run: The run.
        other_robot: Whether it is used on another robot on purpose.
        training: Whether it is trained on: then demonstrations and threads matter too.
    """
    made_from = read_made_from(run.config)
    if made_from is None:
        return []
    config = run.train_config
    found = []
    if not other_robot:
        if _differ(made_from.robot, robot_digest(config.robot)):
            found.append("its robot file has changed")
        if _differ(made_from.model, model_digest(run.family)):
            found.append(f"the model of {run.family.name} has changed")
    if training:
        if config.demos and _differ(made_from.demos, folder_digest(Path(config.demos))):
            found.append("its demonstrations have changed")
        threads = thread_count(config)
        if made_from.threads and made_from.threads != threads:
            found.append(f"it was trained with {made_from.threads} threads, not {threads}")
    here = version("metarobot")
    before = run.config.get("versions", {}).get("metarobot", here)
    if before != here:
        found.append(f"it was made with metarobot {before}, not {here}")
    return found


def warn_of_differences(run: Run, *, other_robot: bool = False, training: bool = False) -> None:
    """Log a line if anything that a run was made from is different here."""
    found = origin_differences(run, other_robot=other_robot, training=training)
    if found:
        end = ": it goes on, but not bit for bit" if training else ""
        _log.warning("warning: %s is not as it was made: %s%s", run.folder, "; ".join(found), end)


def robot_digest(robot: str) -> str:
    """Return a hash of a robot's MJCF file and of all files that it names.

    Empty for no robot, for one of the Menagerie, whose model has a hash of its own, and for a file
    that cannot be read.
    """
    if not robot or robot.startswith("menagerie:"):
        return UNREADABLE
    digest = hashlib.sha256()
    try:
        for path in _model_files(Path(robot)):
            digest.update(hashlib.sha256(read_regular_file(path, MAX_MODEL_BYTES)).digest())
    except (OSError, BadValueError):
        return UNREADABLE
    return digest.hexdigest()


def _model_files(main: Path) -> Iterator[Path]:
    """Yield an MJCF file, and the files that it and the files it includes name, in their order.

    Files that do not exist are left out: MuJoCo will tell.
    """
    seen: set[Path] = set()
    waiting = [main]
    folders = {main.parent}
    while waiting and len(seen) < MAX_MODEL_FILES:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.add(path)
        yield path
        if path.suffix != ".xml":
            continue

        with suppress(ET.ParseError):
            # The user's own file; MuJoCo has read it too.
            text = read_regular_file(path, MAX_MODEL_BYTES)
            elements = list(ET.fromstring(text).iter())  # noqa: S314
            # Meshes and pictures may lie in folders that the compiler element names.
            for element in elements:
                for name in _FOLDER_ATTRIBUTES:
                    if name in element.attrib:
                        folders.add(main.parent / element.attrib[name])
            for element in elements:
                if "file" in element.attrib:
                    places = [folder / element.attrib["file"] for folder in sorted(folders)]
                    waiting += [place for place in places if place.is_file()]


def model_digest(family: Family) -> str:
    """Return a hash of a family's nominal model, as MuJoCo writes it; paths are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        spec = family.spec()
        spec.compile()
        text = spec.to_xml()
    return hashlib.sha256(_MACHINE_PATH.sub("", text).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """Return a hash of all files of a folder, with their names; empty if it cannot be read."""
    digest = hashlib.sha256()
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            digest.update(str(path.relative_to(folder)).encode() + b"\0")
            digest.update(_file_digest(path))
    except OSError:
        return UNREADABLE
    return digest.hexdigest() if files else UNREADABLE


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


def _differ(before: str, now: str) -> bool:
    """Return whether two hashes differ; what could not be read is reported elsewhere."""
    return bool(before) and bool(now) and before != now
