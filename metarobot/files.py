"""Files that are written whole or not at all, and JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarobot.errors import MetarobotError


class FileError(MetarobotError):
    """A file that cannot be read or written, or is damaged."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes its place if the block succeeds and vanishes
    if it does not.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o644)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or say in one line why not."""
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise FileError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise FileError(f"{path} is damaged: {e}") from e


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``out``; it takes its place if the block succeeds and vanishes
    if it does not.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            if out.exists():
                out.rename(Path(temporary) / "old")
            new.rename(out)
    except OSError as e:
        raise FileError(f"cannot write {out}: {e.strerror or e}") from e
