"""Gradient steps, on as many cores as torch is told to use; and what keeps cores and memory from
being wasted.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from metarobot.errors import MetarobotError


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Let torch use one thread: its workers would spin against the physics threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed tensors' pages: without it a fifth of the learning time goes into
    page faults.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in (
            (-3, 1 << 30),
            (-1, 2**31 - 1),
            (-2, 1 << 27),
        ):  # MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(option, value)


def check_replay_memory(transitions: int, needed: int) -> None:
    """Raise if the bytes that a replay of so many transitions needs are not to be had."""
    free = available_memory()
    if needed > free:
        raise MetarobotError(
            f"a replay of {transitions:,} transitions needs {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB "
            "are free; lower --replay"
        )


def available_memory() -> int:
    """Bytes of memory that may still be taken; Linux's page cache, which gives way, is among
    them.
    """
    known = Path("/proc/meminfo")
    lines = known.read_text().splitlines() if known.exists() else []
    found = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0
    )
    return found or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def restored_torch_threads() -> Iterator[None]:
    """Leave torch's thread count as it was found."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
