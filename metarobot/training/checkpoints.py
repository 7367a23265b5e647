"""Checkpoints of a run folder: the last three and the best, each with a hash of its own.

``checkpoint.json`` describes the newest one. Beside each ``checkpoint-HASH.safetensors`` stands a
``checkpoint-HASH.json`` that describes it, so that an older one can be used where the newest is
damaged. ``checkpoint.json`` is replaced last, so at any moment it names a complete one.
A folder of an earlier version, or of a published agent, has ``checkpoint.json`` and one weights
file.
"""

from __future__ import annotations

import hashlib
import logging
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metarobot.bridge.policy.checked_json import BadValueError, parse_json, read_regular_file
from metarobot.files import atomic_path
from metarobot.training.run_files import (
    MAX_JSON_BYTES,
    CheckpointEntry,
    CheckpointError,
    checkpoint_data,
    one_line,
    read_checkpoint_entry,
    write_sealed,
)

CHECKPOINT_FILE = "checkpoint.json"
AGENT_PREFIX = "agent."
"""Begins the names of the agent's tensors; the others are the optimiser's and the normalisers'."""
KEPT = 3
"""Checkpoints that are kept besides the best."""
MAX_WEIGHTS_BYTES = 32_000_000_000
"""A replay buffer is a part of a checkpoint."""
MAX_HEADER_BYTES = 10_000_000
READ_TRIES = 50
"""A reader begins again if the writer replaced the checkpoint meanwhile."""

_OWN_WEIGHTS = re.compile(r"checkpoint-[0-9a-f]{12}\.safetensors")
_OWN_ENTRY = re.compile(r"checkpoint-[0-9a-f]{12}\.json")
_OWN_TEMPORARY = re.compile(
    r"\.(checkpoint(-[0-9a-f]{12})?|config|tasks|metrics|card)-[a-z0-9_]{8}"
    r"\.(json|jsonl|safetensors)"
)
"""Names that ``atomic_path`` gives to files that are being written."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Type of a tensor -> its name in a safetensors file."""

_log = logging.getLogger("metarobot")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint that was read and agrees with its hash."""

    entry: CheckpointEntry
    data: bytes
    """The weights file."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the named tensors."""
        loaded: dict[str, Tensor] = safetensors.torch.load(self.data)
        return loaded


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]
) -> None:
    """Write a checkpoint, and delete those that are no longer kept.

    Args:
        folder: The run folder.
        tensors: Named tensors.
        counters: ``iteration``, ``steps`` and ``elapsed_s``, and perhaps a ``score``.

    Raises:
        FileError: The operating system refuses to write; the checkpoints before stay whole.
    """
    entry = _write_weights(folder, tensors, counters)
    data = checkpoint_data(entry)
    write_sealed(_entry_path(folder, entry), data)
    # From here on the new checkpoint is the run's.
    write_sealed(folder / CHECKPOINT_FILE, data)
    _prune(folder, entry)


def save_only_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]
) -> None:
    """Write the one checkpoint of a published agent; any others are deleted."""
    entry = _write_weights(folder, tensors, counters)
    write_sealed(folder / CHECKPOINT_FILE, checkpoint_data(entry))
    _delete_others(folder, {entry.weights})


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run folder has a checkpoint, sound or not."""
    return next(folder.glob("checkpoint*.json"), None) is not None


def latest_entry(folder: Path) -> CheckpointEntry | None:
    """Return what the newest readable checkpoint's JSON file says; None if there is no checkpoint.

    Raises:
        CheckpointError: There are checkpoints, but none is readable.
    """
    entries, faults = _read_entries(folder)
    if entries:
        return entries[0]
    if has_checkpoint(folder):
        raise faults[0]
    return None


def read_checkpoint(folder: Path) -> StoredCheckpoint:
    """Read the newest sound checkpoint; log a line if it is not the newest.

    Raises:
        CheckpointError: There is none.
    """
    for _ in range(READ_TRIES):
        before = _file_bytes(folder / CHECKPOINT_FILE)
        found, faults = _find_sound(folder)
        # A training beside us may have replaced what we were about to read.
        if not faults or _file_bytes(folder / CHECKPOINT_FILE) == before:
            break
    if found is None:
        raise faults[0]
    if faults:
        _log.warning(
            "warning: %s; falling back to the checkpoint after %s iterations (%s steps)",
            one_line(faults[0], 400),
            f"{found.entry.iteration:,}",
            f"{found.entry.steps:,}",
        )
    return found


def settle(folder: Path, entry: CheckpointEntry) -> None:
    """Make a checkpoint the newest of its folder, before training goes on from it.

    What came after it, and files that a killed training left half-written, are deleted.

    Raises:
        FileError: The operating system refuses to write.
    """
    data = checkpoint_data(entry)
    write_sealed(_entry_path(folder, entry), data)
    write_sealed(folder / CHECKPOINT_FILE, data)
    _prune(folder, entry, drop_later=True)
    sweep_temporary_files(folder)


def sweep_temporary_files(folder: Path) -> None:
    """Delete files of ours that a killed training left half-written."""
    for path in folder.glob(".*"):
        if _OWN_TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def check_weights(data: bytes, expected: Mapping[str, Tensor]) -> None:
    """Check the header of a weights file before any tensor of it is loaded.

    Args:
        data: The file.
        expected: The agent's tensors, by their names without the prefix.

    Raises:
        CheckpointError: Its names, shapes or types are not those of the agent.
    """
    header = _read_header(data)
    found = {
        name.removeprefix(AGENT_PREFIX): (tensor["dtype"], tuple(tensor["shape"]))
        for name, tensor in header.items()
        if name.startswith(AGENT_PREFIX)
    }
    wanted = {
        name: (_DTYPES.get(tensor.dtype, "?"), tuple(tensor.shape))
        for name, tensor in expected.items()
    }
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            held = _describe_tensor(found.get(name))
            asked = _describe_tensor(wanted.get(name))
            raise CheckpointError(f"{ascii(name)[1:-1][:100]} is {held}, not {asked}")


def _describe_tensor(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    if tensor is None:
        return "missing"
    dtype, shape = tensor
    return f"{dtype} {list(shape)}"[:100]


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]
) -> CheckpointEntry:
    data = safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()})
    # Weights of another content have another name, so those of the last checkpoint stay whole.
    digest = hashlib.sha256(data).hexdigest()
    weights = folder / f"checkpoint-{digest[:12]}.safetensors"
    with atomic_path(weights) as temporary:
        temporary.write_bytes(data)
    return CheckpointEntry(
        iteration=counters["iteration"],
        steps=counters["steps"],
        elapsed_s=counters["elapsed_s"],
        score=counters.get("score"),
        weights=weights.name,
        sha256=digest,
    )


def _entry_path(folder: Path, entry: CheckpointEntry) -> Path:
    return folder / Path(entry.weights).with_suffix(".json").name


def _read_entries(folder: Path) -> tuple[list[CheckpointEntry], list[CheckpointError]]:
    """Read the JSON files of all checkpoints, that of ``checkpoint.json`` and then newest first."""
    entries: list[CheckpointEntry] = []
    faults: list[CheckpointError] = []
    older: list[CheckpointEntry] = []
    for path in (folder / CHECKPOINT_FILE, *sorted(folder.glob("checkpoint-*.json"))):
        try:
            entry = read_checkpoint_entry(path)
        except CheckpointError as e:
            faults.append(e)
            continue
        if path.name == CHECKPOINT_FILE:
            entries.append(entry)
        else:
            older.append(entry)

    older.sort(key=lambda entry: entry.iteration, reverse=True)
    known = {entry.weights for entry in entries}
    return [*entries, *(entry for entry in older if entry.weights not in known)], faults


def _find_sound(folder: Path) -> tuple[StoredCheckpoint | None, list[CheckpointError]]:
    """Read checkpoints, newest first, until one is sound; return it and what was wrong before."""
    entries, unreadable = _read_entries(folder)
    # The newest file is damaged if it cannot be read; a damaged older one matters to nobody.
    newest = str(folder / CHECKPOINT_FILE)
    faults = [fault for fault in unreadable if newest in str(fault)]
    for entry in entries:
        try:
            return _read_weights(folder, entry), faults
        except CheckpointError as e:
            faults.append(e)
    return None, faults or unreadable


def _read_weights(folder: Path, entry: CheckpointEntry) -> StoredCheckpoint:
    """Read a weights file and check it.

    Raises:
        CheckpointError: It is missing or damaged, or holds weights that are not finite.
    """
    path = folder / entry.weights
    try:
        data = read_regular_file(path, MAX_WEIGHTS_BYTES)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e
    except BadValueError as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(
            f"{path} is damaged (not the SHA-256 of its JSON file): restore it or train again"
        )
    stored = StoredCheckpoint(entry, data)
    try:
        _read_header(data)
        for name, tensor in stored.tensors().items():
            is_weight = name.startswith(AGENT_PREFIX) and tensor.is_floating_point()
            if is_weight and not tensor.isfinite().all():
                raise CheckpointError(f"{path} holds weights that are not finite: {name[:100]}")
    except (BadValueError, safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is damaged: {one_line(e)}") from e
    return stored


def _read_header(data: bytes) -> dict[str, Any]:
    """Return the tensors that a safetensors file describes.

    Raises:
        BadValueError: Its header is too long or says anything but types, shapes and places.
    """
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise BadValueError(f"its header is said to be {length:,} bytes long")
    try:
        header = parse_json(data[8 : 8 + length])
    except ValueError as e:
        raise BadValueError(f"its header is no JSON: {one_line(e)}") from e
    if not isinstance(header, dict):
        raise BadValueError("its header is no object")
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        is_described = isinstance(tensor, dict) and tensor.keys() == {
            "dtype",
            "shape",
            "data_offsets",
        }
        if not is_described or not isinstance(tensor["shape"], list):
            raise BadValueError(f"its header does not describe {ascii(name)[:100]}")
    return header


def _prune(folder: Path, newest: CheckpointEntry, *, drop_later: bool = False) -> None:
    """Delete the checkpoints that are neither the newest, nor among the last, nor the best."""
    entries, _ = _read_entries(folder)
    if drop_later:
        entries = [entry for entry in entries if entry.iteration <= newest.iteration]
    others = [entry for entry in entries if entry.weights != newest.weights]
    others.sort(key=lambda entry: entry.iteration, reverse=True)
    kept = {newest.weights, *(entry.weights for entry in others[: KEPT - 1])}
    best = best_entry(entries)
    if best is not None:
        kept.add(best.weights)
    _delete_others(folder, kept)


def best_entry(entries: Sequence[CheckpointEntry]) -> CheckpointEntry | None:
    """Return the checkpoint with the highest score; None if no score is known."""
    scored = [entry for entry in entries if entry.score is not None]
    return max(scored, key=lambda entry: entry.score or 0.0, default=None)


def _delete_others(folder: Path, kept: set[str]) -> None:
    """Delete our weights files, and what describes them, whose names are not kept."""
    for path in folder.glob("checkpoint-*"):
        is_ours = _OWN_WEIGHTS.fullmatch(path.name) or _OWN_ENTRY.fullmatch(path.name)
        if is_ours and path.with_suffix(".safetensors").name not in kept:
            with suppress(OSError):
                path.unlink()


def _file_bytes(path: Path) -> bytes:
    try:
        return read_regular_file(path, MAX_JSON_BYTES)
    except (OSError, BadValueError):
        return b""
