"""The JSON files of a run folder: written whole, read through one schema each, never believed.

A run folder may come from a stranger or from a failing disk. Each file carries a hash of its own
content, so that no number in it changes unnoticed; a stranger can renew the hash, so every value is
checked too. Files of earlier versions have no such hash.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from metarobot.bridge.policy.checked_json import (
    BadValueError,
    canonical_digest,
    check_boolean,
    check_integer,
    check_list,
    check_name,
    check_number,
    check_object,
    check_text,
    parse_json,
    read_regular_file,
)
from metarobot.config_bounds import check_bounds
from metarobot.errors import MetarobotError
from metarobot.files import FileError, write_json

CONTENT_KEY = "content_sha256"
"""Key of the hash over everything else in the file."""
MAX_JSON_BYTES = 4_000_000
"""The largest file in the box has 20,000."""
LARGEST_NUMBER = 1e15
"""No count and no setting needs more; larger floats do not hold every whole number."""

_WEIGHTS_NAME = re.compile(r"checkpoint(-[0-9a-f]{1,64})?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ABOUT_KEYS = ("agent_config", "versions", "machine", "made_from")

Settings = TypeVar("Settings")


class CheckpointError(FileError):
    """A run folder that is not one, is damaged, or cannot be written."""


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """What the JSON file of a checkpoint says."""

    iteration: int
    steps: int
    """Environment steps collected."""
    elapsed_s: float
    weights: str
    """Name of the weights file."""
    sha256: str
    """SHA-256 of the weights file."""
    score: float | None = None
    """Return of the last episode, mean over recent iterations; None if it is not known."""


@dataclass(frozen=True, kw_only=True)
class MadeFrom:
    """What a run was made from, besides its settings: hashes, and the count of threads."""

    robot: str = ""
    """SHA-256 of the robot's file and of the files it names; empty if the robot is the family's."""
    demos: str = ""
    """SHA-256 of the demonstrations; empty if there are none."""
    model: str = ""
    """SHA-256 of the family's nominal model."""
    threads: int = 0
    """CPU threads that the last training used."""


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with a hash over its content.

    Raises:
        FileError: The operating system refuses to write, or a number is not finite.
    """
    content = {key: value for key, value in data.items() if key != CONTENT_KEY}
    try:
        digest = canonical_digest(content)
    except ValueError as e:
        raise FileError(f"cannot write {path}: {e}") from e
    write_json(path, {**content, CONTENT_KEY: digest})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object, and check its hash if it has one.

    Raises:
        CheckpointError: It cannot be read, is no such object, or is not what was written.
    """
    try:
        data = parse_json(read_regular_file(path, MAX_JSON_BYTES))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise CheckpointError(f"{path} is damaged: {one_line(e)}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")

    digest = data.pop(CONTENT_KEY, None)
    if digest is not None and digest != canonical_digest(data):
        raise CheckpointError(
            f"{path} was changed or is damaged: its content is not that of {CONTENT_KEY}; restore "
            "it, or remove that entry if the change is yours"
        )
    return data


def read_checkpoint_entry(path: Path) -> CheckpointEntry:
    """Read the JSON file of a checkpoint.

    Raises:
        CheckpointError: It cannot be read, or is damaged.
    """
    data = read_sealed(path)
    try:
        check_object(data, "it", ("iteration", "steps", "weights", "sha256", "elapsed_s"), data)
        count = int(LARGEST_NUMBER)
        score = data.get("return")
        return CheckpointEntry(
            iteration=check_integer(data["iteration"], "iteration", 0, count),
            steps=check_integer(data["steps"], "steps", 0, count),
            elapsed_s=check_number(data["elapsed_s"], "elapsed_s", 0, LARGEST_NUMBER),
            # Only such a name: a damaged file must not lead out of the folder.
            weights=_check_pattern(data["weights"], "weights", _WEIGHTS_NAME),
            sha256=_check_pattern(data["sha256"], "sha256", _SHA256),
            score=None if score is None else _check_real(score, "return"),
        )
    except BadValueError as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e


def checkpoint_data(entry: CheckpointEntry) -> dict[str, Any]:
    """Return what the JSON file of a checkpoint holds."""
    data = dataclasses.asdict(entry)
    score = data.pop("score")
    return data if score is None else {**data, "return": score}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check the entries of ``config.json`` that are no settings of a training.

    Raises:
        CheckpointError: An entry is missing, or is not what it must be.
    """
    try:
        for key in ("format", "family", "agent", "agent_config"):
            if key not in config:
                raise BadValueError(f"it has no {key!r}")
        check_integer(config["format"], "format", 1, int(LARGEST_NUMBER))
        check_name(config["family"], "family")
        check_name(config["agent"], "agent")
        check_text(config.get("robot", ""), "robot")
        check_text(config.get("machine", ""), "machine")
        versions = _check_dict(config.get("versions", {}), "versions")
        for package, number in versions.items():
            check_name(package, "a package of versions")
            check_name(number, f"versions of {package}")
        _check_dict(config["agent_config"], "agent_config")
        read_made_from(config)
    except BadValueError as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e


def read_made_from(config: Mapping[str, Any]) -> MadeFrom | None:
    """Return what ``config.json`` says a run was made from; None if it is older than that.

    Raises:
        BadValueError: It is not what it must be.
    """
    if "made_from" not in config:
        return None
    known = [field.name for field in dataclasses.fields(MadeFrom)]
    data = check_object(config["made_from"], "made_from", known)
    hashes = {}
    for name in ("robot", "demos", "model"):
        value = check_text(data[name], f"made_from.{name}")
        hashes[name] = value and _check_pattern(value, f"made_from.{name}", _SHA256)
    return MadeFrom(
        **hashes,
        threads=check_integer(data["threads"], "made_from.threads", 0, 100_000),
    )


def setting_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``config.json`` that are settings of a training."""
    return {k: v for k, v in config.items() if k not in ("format", "kind", *_ABOUT_KEYS)}


def read_settings(path: Path, kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build a configuration from what a JSON file holds; what is missing has its default.

    Raises:
        CheckpointError: An entry that the configuration class does not have, or a value of another
            type or out of bounds.
    """
    hints = get_type_hints(kind, include_extras=True)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        shown = ", ".join(ascii(name)[1:-1][:100] for name in unknown[:10])
        raise CheckpointError(
            f"{path} has settings that this metarobot does not know: {shown}; "
            f"it knows: {', '.join(known)}"
        )
    try:
        for name, value in values.items():
            _check_type(value, name, hints[name])
        settings = kind(**values)
        check_bounds(settings)
    except (MetarobotError, BadValueError) as e:
        raise CheckpointError(f"{path} is damaged: {one_line(e)}") from e
    return settings


def read_card(path: Path) -> dict[str, Any]:
    """Read the card of a published agent.

    Raises:
        CheckpointError: It cannot be read, or is damaged.
    """
    card = read_sealed(path)
    try:
        for name in ("summary", "command", "machine"):
            if name in card:
                check_text(card[name], name)
        for name in ("wall_s", "steps", "seed"):
            if name in card:
                check_number(card[name], name, 0, LARGEST_NUMBER)
    except BadValueError as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e
    return card


def one_line(error: Exception, length: int = 200) -> str:
    """Return an error's message on one line, cut to a readable length."""
    line = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in line)[:length]


def _check_type(value: Any, name: str, hint: Any) -> None:
    """Check that a setting is of the type that its field has."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if hint is bool:
        check_boolean(value, name)
    elif hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadValueError(f"{name} is {ascii(value)[:60]}, not a whole number")
    elif hint is float:
        _check_real(value, name)
    elif hint is str:
        check_text(value, name)
    elif get_origin(hint) is tuple:
        check_list(value, name)


def _check_real(value: Any, name: str) -> float:
    return check_number(value, name, -LARGEST_NUMBER, LARGEST_NUMBER)


def _check_dict(value: Any, name: str) -> dict[str, Any]:
    return check_object(value, name, (), value if isinstance(value, dict) else ())


def _check_pattern(value: Any, name: str, pattern: re.Pattern[str]) -> str:
    text = check_text(value, name)
    if not pattern.fullmatch(text):
        raise BadValueError(f"{name} is {ascii(text)[:60]}, not of the form {pattern.pattern}")
    return text
