"""Files and folders that are written whole or not at all, and JSON."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarobot.errors import MetarobotError

FILE_MODE = 0o644
MAX_JSON_BYTES = 500_000_000
"""Reports with the returns of every task are large; nothing of ours is larger."""


class FileError(MetarobotError):
    """A file that cannot be read or written, or is damaged."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the block succeeds and is deleted if not.

    The temporary file stands beside ``path``, whose folder is made if it is missing, and has the
    same suffix.

    Raises:
        FileError: The operating system refuses to write.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(FILE_MODE)

        yield temporary

        # Without this, a power cut after the rename could leave an empty file.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` if the block succeeds, else is deleted.

    Raises:
        FileError: The operating system refuses to write.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()

            yield new

            # What was there before goes into the temporary folder, and is deleted with it.
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
    except OSError as e:
        raise FileError(f"cannot write {folder}: {e.strerror or e}") from e


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically.

    Raises:
        FileError: The operating system refuses to write.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path: Path) -> Any:
    """Read JSON from a regular file; never wait, and never read more than ``MAX_JSON_BYTES``.

    Raises:
        FileError: The file cannot be read, is too large, or is not JSON.
    """
    try:
        # A FIFO without a writer would hold up an open that may block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
                raise FileError(
                    f"{path} is damaged: it is no regular file of at most {MAX_JSON_BYTES:,} bytes"
                )
            return json.loads(file.read())
    except OSError as e:
        raise FileError(f"cannot read {path}: {e.strerror or e}") from e
    except RecursionError:
        raise FileError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as e:
        raise FileError(f"{path} is damaged: {e}") from e
