"""Gradient steps; on the CPU on several cores, each taking its share of a minibatch on a thread of its own; its heap.

For networks this small, splitting every matrix product over cores (torch's own way) gains a third at best; splitting
the minibatch nearly doubles the speed on two. Shares are summed in a fixed order, so the result is reproducible.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

Step = Callable[[], Tensor]
"""Takes a gradient step and returns its statistics ``(statistic,)``."""
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows -> (their share of the loss, their share of the statistics): shares add up to the minibatch's."""


def gradients(loss: Loss, rows: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Set each parameter's gradient of ``loss`` over ``rows`` and return the statistics, detached.

    Uses as many threads as torch is set to, on the CPU.
    """
    wanted = list(parameters)
    threads = torch.get_num_threads() if wanted[0].device.type == "cpu" else 1

    def share(part: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        value, statistics = loss(part)
        return torch.autograd.grad(value, wanted), statistics.detach()

    shares = list(pool(threads).map(share, rows.chunk(threads))) if threads > 1 else [share(rows)]
    for i, p in enumerate(wanted):
        p.grad = sum((grads[i] for grads, _ in shares[1:]), start=shares[0][0][i])
    return sum((s for _, s in shares[1:]), start=shares[0][1])


def descend(passes: Iterable[Iterable[Step]], watched: int, limit: float) -> tuple[Tensor, int]:
    """Take the steps of each pass until the statistic ``watched`` exceeds a limit; return sums and number of steps.

    On the CPU each step is looked at. On an accelerator a look waits for all that was asked of it, so there is one a
    pass, at the pass's largest: it ends with the pass.
    """
    sums, taken = torch.zeros(()), 0
    for steps in passes:
        seen = []
        for step in steps:
            said = step()
            sums, taken = said if taken == 0 else sums + said, taken + 1
            seen.append(said[watched])
            if said.device.type == "cpu" and float(said[watched]) > limit:
                return sums, taken
        if float(torch.stack(seen).amax()) > limit:
            break
    return sums, taken


@cache
@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: its workers would spin against the physics threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pool(threads: int) -> ThreadPoolExecutor:
    """Return so many threads, on each of which torch uses one core."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def steady_heap() -> None:
    """Tell glibc to keep freed tensors' pages: without it a fifth of the learning time goes into page faults."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 27)):  # MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(option, value)
