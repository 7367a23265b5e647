"""Processor cores and memory: thread counts of torch, and how much memory is free."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from metarobot.errors import MetarobotError

GLIBC_MALLOC_OPTIONS = {
    -3: 1 << 30,  # M_MMAP_THRESHOLD, bytes
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD, bytes
    -2: 1 << 27,  # M_TOP_PAD, bytes
}
"""Options of ``mallopt`` that make glibc keep the pages of freed memory."""


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Let torch use one thread: its worker threads would spin against the physics threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def restored_torch_threads() -> Iterator[None]:
    """Restore torch's thread count when the block ends."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Make glibc keep the pages of freed tensors for the next ones.

    Without it, page faults take a fifth of the learning time. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in GLIBC_MALLOC_OPTIONS.items():
        libc.mallopt(option, value)


def available_memory() -> int:
    """Return the bytes of memory that can still be allocated.

    On Linux this counts the page cache, which gives way.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                kibibytes = int(line.split()[1])
                return kibibytes * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_replay_memory(transitions: int, needed: int) -> None:
    """Check that a replay buffer fits into memory.

    Args:
        transitions: Transitions that the buffer holds.
        needed: Bytes that it takes.

    Raises:
        MetarobotError: Less memory is free.
    """
    free = available_memory()
    if needed > free:
        raise MetarobotError(
            f"a replay of {transitions:,} transitions needs {needed / 1e9:,.1f} GB of memory, "
            f"and {free / 1e9:,.1f} GB are free; lower --replay"
        )
