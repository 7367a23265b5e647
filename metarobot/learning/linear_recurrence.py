"""The linear recurrence ``h_t = a_t h_{t−1} + b_t`` over sequences, on the CPU and on a GPU."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``h_t = a_t h_{t−1} + b_t`` from ``h_{−1} = 0``, differentiably in both.

    ``a``, ``b`` and the result are ``(time, ...)``.
    """
    if a.is_cuda and _load_kernels() is not None:
        fused: Tensor = _FusedScan.apply(a, b)  # type: ignore[no-untyped-call]
        return fused

    # split time into about √T chunks of √T steps, the last one padded
    time = len(a)
    rest = a.shape[1:]
    chunk_steps = max(1, round(math.sqrt(time)))
    padding = -time % chunk_steps
    if padding:
        a = torch.cat([a, a.new_zeros(padding, *rest)])
        b = torch.cat([b, b.new_zeros(padding, *rest)])
    a_chunks = a.reshape(-1, chunk_steps, *rest).contiguous()
    b_chunks = b.reshape(-1, chunk_steps, *rest).contiguous()
    h: Tensor = _ChunkedScan.apply(a_chunks, b_chunks)  # type: ignore[no-untyped-call]
    return h.reshape(-1, *rest)[:time]


class _ChunkedScan(torch.autograd.Function):
    """The recurrence over ``(chunk, step, ...)`` with its hand-written backward pass.

    Both passes take about 2√T vectorised steps: first the steps inside all chunks at once, from
    zero, then the ends of the chunks in order. The backward pass is the same recurrence reversed.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        # inside each chunk, from zero: h, and the product of all a so far
        h = torch.empty_like(b)
        decay = torch.empty_like(a)
        a_steps = a.unbind(1)
        b_steps = b.unbind(1)
        h_steps = h.unbind(1)
        decay_steps = decay.unbind(1)
        h_steps[0].copy_(b_steps[0])
        decay_steps[0].copy_(a_steps[0])
        for t in range(1, len(h_steps)):
            torch.addcmul(b_steps[t], a_steps[t], h_steps[t - 1], out=h_steps[t])
            torch.mul(a_steps[t], decay_steps[t - 1], out=decay_steps[t])

        # the true h before each chunk, chunk by chunk
        start = torch.zeros_like(h[:, 0])
        for c in range(1, len(h)):
            torch.addcmul(h[c - 1, -1], decay[c - 1, -1], start[c - 1], out=start[c])

        # h_t += (∏ a) h_start
        h.addcmul_(decay, start[:, None])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # g_t = ∂L/∂h_t + a_{t+1} g_{t+1};   ∂L/∂b_t = g_t;   ∂L/∂a_t = g_t h_{t−1}
        a, h = ctx.saved_tensors
        g = torch.empty_like(h)
        decay = torch.empty_like(a)
        a_steps = a.unbind(1)
        grad_steps = grads[0].unbind(1)
        g_steps = g.unbind(1)
        decay_steps = decay.unbind(1)
        g_steps[-1].copy_(grad_steps[-1])
        decay_steps[-1].fill_(1.0)
        for t in range(len(g_steps) - 2, -1, -1):
            torch.addcmul(grad_steps[t], a_steps[t + 1], g_steps[t + 1], out=g_steps[t])
            torch.mul(a_steps[t + 1], decay_steps[t + 1], out=decay_steps[t])

        # what comes back into the last step of each chunk, chunk by chunk
        start = torch.zeros_like(g[:, 0])
        for c in range(len(g) - 2, -1, -1):
            torch.addcmul(g[c + 1, 0], decay[c + 1, 0], start[c + 1], out=start[c])
            start[c].mul_(a[c + 1, 0])
        g.addcmul_(decay, start[:, None])

        grad_a = torch.zeros_like(a)
        g_flat = g.flatten(0, 1)
        h_flat = h.flatten(0, 1)
        torch.mul(g_flat[1:], h_flat[:-1], out=grad_a.flatten(0, 1)[1:])
        return grad_a, g


class _FusedScan(torch.autograd.Function):
    """The recurrence as one GPU kernel per pass.

    A lane runs one sequence, keeps its state in a register and reads each number once. There are
    worlds × width lanes, enough without splitting time, so memory bandwidth is the limit.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a = a.contiguous()
        b = b.contiguous()
        h = torch.empty_like(b)
        kernels = _load_kernels()
        _launch(kernels.forward, a, b, h)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        grad_a = torch.empty_like(a)
        grad_b = torch.empty_like(a)
        kernels = _load_kernels()
        _launch(kernels.backward, a, h, grads[0].contiguous(), grad_a, grad_b)
        return grad_a, grad_b


LANES_PER_PROGRAM = 128
"""Sequences that one GPU program runs."""


def _launch(kernel: Any, *tensors: Tensor) -> None:
    time = len(tensors[0])
    lanes = tensors[0][0].numel()
    programs = math.ceil(lanes / LANES_PER_PROGRAM)
    kernel[(programs,)](*tensors, time, lanes, LANES_PER_PROGRAM)


@cache
def _load_kernels() -> Any:
    """Return the module of Triton kernels; None without Triton, which comes with CUDA builds."""
    try:
        from metarobot.learning import linear_recurrence_kernels
    except ImportError:
        return None
    return linear_recurrence_kernels
