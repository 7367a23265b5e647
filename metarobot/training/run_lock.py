"""One writer a run folder: a lock of the operating system's that dies with its process."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from metarobot.files import FILE_MODE
from metarobot.training.run_files import CheckpointError

LOCK_FILE = ".lock"
"""Empty: neither process nor machine are written down."""


class RunLock:
    """The right to write into a run folder, until it is released; a context manager.

    Readers need none. The lock file is removed when the lock is released; one that a killed process
    left behind locks nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock of a folder, which is made if it is missing.

        Raises:
            CheckpointError: Another training has it, or the operating system refuses.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # By its descriptor the folder is found even after it was renamed.
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                descriptor = _open_locked(place)
            except BaseException:
                os.close(place)
                raise
        except BlockingIOError as e:
            raise CheckpointError(
                f"{folder} is being written by {_holder(folder / LOCK_FILE)}: wait for it, or stop "
                "it first"
            ) from e
        except OSError as e:
            raise CheckpointError(f"cannot write {folder}: {e.strerror or e}") from e
        # A training that is built and dropped must not keep its folder locked.
        self._release = weakref.finalize(self, _release, place, descriptor)

    @property
    def is_held(self) -> bool:
        """Whether it has not been released."""
        return self._release.alive

    def release(self) -> None:
        """Let others write; releasing twice does nothing."""
        self._release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _open_locked(place: int) -> int:
    """Open and lock the lock file of a folder, given by its descriptor; return the file's."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        descriptor = os.open(LOCK_FILE, flags, FILE_MODE, dir_fd=place)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed the file between the two calls: then it is no lock.
            if _is_lock_file(place, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_lock_file(place: int, descriptor: int) -> bool:
    try:
        named = os.stat(LOCK_FILE, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _release(place: int, descriptor: int) -> None:
    with suppress(OSError):
        if _is_lock_file(place, descriptor):
            os.unlink(LOCK_FILE, dir_fd=place)
    os.close(descriptor)
    os.close(place)


def _holder(path: Path) -> str:
    """Return what is known of the process that holds a lock: Linux lists all locks by inode."""
    with suppress(OSError, ValueError, IndexError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                return f"process {int(words[4])}"
    return "another process"
