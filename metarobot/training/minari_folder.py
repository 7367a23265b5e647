"""Read the folder of a Minari dataset that a stranger may have made.

Minari itself makes the environment that the metadata name if they lack a space, and so imports any
module they name; HDF5 follows links into other files and loads filters as plugins. Here the
metadata are data, and of HDF5 only plain arrays of numbers in the file itself are read, in a size
that the metadata and the file's own size allow.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metarobot.errors import MetarobotError

METADATA_FILE = "metadata.json"
DATA_FILE = "main_data.hdf5"
MAX_METADATA_BYTES = 16 << 20
MAX_DATA_BYTES = 8 << 30
"""Of the HDF5 file, and of the arrays in it together."""
MAX_EXPANSION = 200
"""How many times as large as the file its arrays may be, when they are compressed."""
MAX_EPISODES = 1_000_000
MAX_STEPS = 100_000_000
MAX_COLUMNS = 100_000
ALLOWED_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
"""Filters that h5py brings along, by HDF5's number; any other would be loaded as a plugin."""
_MAX_LINE_CHARS = 500


class MinariFolderError(MetarobotError):
    """A dataset that is damaged, too large, or asks for more than arrays."""


@dataclass(frozen=True, kw_only=True)
class StoredEpisode:
    """One episode of a dataset."""

    id: int
    observations: np.ndarray
    """float32."""
    actions: np.ndarray
    """float32."""
    infos: dict[str, np.ndarray]
    """``task`` and ``variant``, where they exist, float64."""
    info_names: tuple[str, ...]
    """What else there is, for the error message."""


def printable_line(text: object) -> str:
    """Return a message on one line, without characters that a terminal would obey."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line)[:_MAX_LINE_CHARS]


def read_minari_folder(
    path: Path, versions: Container[str]
) -> tuple[dict[str, Any], list[StoredEpisode]]:
    """Read a dataset's description and all its episodes.

    Args:
        path: Folder of the dataset.
        versions: Versions of Minari whose datasets can be read.

    Raises:
        MinariFolderError: The dataset is refused; what else HDF5 and JSON raise is not caught.
    """
    import h5py

    metadata_file = _regular_file(path, METADATA_FILE, MAX_METADATA_BYTES)
    metadata = json.loads(metadata_file.read_bytes())
    if not isinstance(metadata, dict):
        raise MinariFolderError(f"{METADATA_FILE} holds no JSON object")
    version = metadata.get("minari_version")
    if not isinstance(version, str) or version not in versions:
        raise MinariFolderError(
            f"The installed Minari version does not read datasets of version {version!r:.100}"
        )
    data_format = metadata.get("data_format", "hdf5")
    if data_format != "hdf5":
        raise MinariFolderError(f"its data_format is {data_format!r:.100}; it must be 'hdf5'")
    episode_count = _count(metadata, "total_episodes", MAX_EPISODES)
    step_count = _count(metadata, "total_steps", MAX_STEPS)

    data_file = _regular_file(path, DATA_FILE, MAX_DATA_BYTES)
    size = data_file.stat().st_size
    reader = _ArrayReader(h5py, min(MAX_DATA_BYTES, MAX_EXPANSION * size), step_count)
    with h5py.File(data_file, "r") as file:
        episodes = [reader.episode(file, i) for i in range(episode_count)]
    return _parse_description(metadata.get("description")), episodes


def _regular_file(path: Path, name: str, max_bytes: int) -> Path:
    """Return the path of a file of the dataset.

    Raises:
        MinariFolderError: It is missing, outside the dataset's folder, no file, or too large.
    """
    file = path / "data" / name
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path)):
        raise MinariFolderError(f"{name} is a link out of the folder")
    try:
        info = file.stat()
    except OSError as e:
        raise MinariFolderError(f"{name}: {e.strerror}") from e
    if not stat.S_ISREG(info.st_mode):
        raise MinariFolderError(f"{name} is no regular file")
    if info.st_size > max_bytes:
        raise MinariFolderError(f"{name} has {info.st_size} bytes, more than {max_bytes}")
    return file


def _count(metadata: dict[str, Any], key: str, most: int) -> int:
    value = metadata.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise MinariFolderError(f"its {key} must be from 0 to {most}, not {value!r:.100}")
    return value


def _parse_description(text: Any) -> dict[str, Any]:
    """Return what we wrote about a dataset; other people's descriptions are plain words."""
    try:
        description = json.loads(text or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}


class _ArrayReader:
    """Reads the arrays of a file, and counts what they take.

    Args:
        h5py: The package.
        max_bytes: The most that all arrays may take together.
        steps: The most steps that all episodes may have together.
    """

    def __init__(self, h5py: Any, max_bytes: int, steps: int) -> None:
        self._h5py = h5py
        self._bytes_left = max_bytes
        self._steps_left = steps

    def episode(self, file: Any, i: int) -> StoredEpisode:
        """Read an episode.

        Raises:
            MinariFolderError: Something is missing, or no plain array of numbers.
        """
        group = self._member(file, f"episode_{i}", self._h5py.Group)
        actions = self._array(group, "actions", self._steps_left, np.float32)
        self._steps_left -= len(actions)
        rows = len(actions) + 1
        observations = self._array(group, "observations", rows, np.float32)

        infos: dict[str, np.ndarray] = {}
        names: Sequence[str] = ()
        if "infos" in group:
            info_group = self._member(group, "infos", self._h5py.Group)
            names = sorted(info_group)[:20]
            for name in ("task", "variant"):
                if name in info_group:
                    infos[name] = self._array(info_group, name, rows, np.float64)
        return StoredEpisode(
            id=i,
            observations=observations,
            actions=actions,
            infos=infos,
            info_names=tuple(names),
        )

    def _member(self, group: Any, name: str, kind: type[Any]) -> Any:
        """Return a member of a group, which must be in the file itself.

        Raises:
            MinariFolderError: It is missing, a link, or of another kind.
        """
        where = f"{group.name}/{name}".lstrip("/")
        link = group.get(name, getlink=True)  # opens nothing
        if link is None:
            raise MinariFolderError(f"{DATA_FILE} lacks {where}")
        if type(link) is not self._h5py.HardLink:
            raise MinariFolderError(f"{where} is a {type(link).__name__}; links are not followed")
        member = group[name]
        if not isinstance(member, kind):
            raise MinariFolderError(f"{where} is a {type(member).__name__}, not a {kind.__name__}")
        return member

    def _array(self, group: Any, name: str, max_rows: int, dtype: type[Any]) -> np.ndarray:
        """Read an array of numbers.

        Raises:
            MinariFolderError: Its data are elsewhere, no numbers, or too many.
        """
        where = f"{group.name}/{name}".lstrip("/")
        dataset = self._member(group, name, self._h5py.Dataset)
        settings = dataset.id.get_create_plist()
        if dataset.is_virtual or settings.get_external_count():
            raise MinariFolderError(f"{where} has its data in other files")
        for filter_index in range(settings.get_nfilters()):
            number = settings.get_filter(filter_index)[0]
            if number not in ALLOWED_FILTERS:
                allowed = ", ".join(ALLOWED_FILTERS.values())
                raise MinariFolderError(
                    f"{where} is stored with the filter {number}; allowed are: {allowed}"
                )

        if dataset.dtype.kind not in "fiub":
            raise MinariFolderError(f"{where} holds no numbers but {dataset.dtype!s:.100}")
        shape = dataset.shape
        if not shape or len(shape) > 2:
            raise MinariFolderError(f"{where} has the shape {shape}; it takes rows of numbers")
        if shape[0] > max_rows or math.prod(shape[1:]) > MAX_COLUMNS:
            raise MinariFolderError(
                f"{where} has the shape {shape}, but by the metadata and its actions at most "
                f"{max_rows} rows"
            )
        # h5py decompresses whole chunks
        chunk_bytes = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
        self._bytes_left -= max(dataset.nbytes, chunk_bytes)
        if self._bytes_left < 0:
            raise MinariFolderError(f"with {where} its arrays are far larger than the file")

        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(dataset[()].astype(dtype))
