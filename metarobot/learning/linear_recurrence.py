"""The linear recurrence ``h_t = a_t h_{t−1} + b_t`` over whole sequences: on the CPU, and as one
kernel on a GPU.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``h_t = a_t h_{t−1} + b_t`` from ``h_{−1} = 0``, ``(time, ...)``, differentiable in
    both.
    """
    if a.is_cuda and _kernels() is not None:
        fused: Tensor = _Fused.apply(a, b)  # type: ignore[no-untyped-call]
        return fused
    time, rest = len(a), a.shape[1:]
    chunk = max(1, round(math.sqrt(time)))
    pad = -time % chunk
    if pad:
        a, b = (torch.cat([x, x.new_zeros(pad, *rest)]) for x in (a, b))
    chunks = (x.reshape(-1, chunk, *rest).contiguous() for x in (a, b))
    h: Tensor = _Scan.apply(*chunks)  # type: ignore[no-untyped-call]
    return h.reshape(-1, *rest)[:time]


class _Scan(torch.autograd.Function):
    """``h_t = a_t h_{t−1} + b_t`` from ``h_{−1} = 0``, with its hand-written backward, the same
    recurrence reversed.

    Both run in ~2√T vectorised steps: all chunks of √T steps at once, then the chunks' ends in
    order.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h, decay = torch.empty_like(b), torch.empty_like(a)
        hs, decays, gates, inputs = h.unbind(1), decay.unbind(1), a.unbind(1), b.unbind(1)
        hs[0].copy_(inputs[0])
        decays[0].copy_(gates[0])
        for t in range(1, len(hs)):
            torch.addcmul(inputs[t], gates[t], hs[t - 1], out=hs[t])
            torch.mul(gates[t], decays[t - 1], out=decays[t])
        start = torch.zeros_like(h[:, 0])
        for c in range(1, len(h)):
            torch.addcmul(h[c - 1, -1], decay[c - 1, -1], start[c - 1], out=start[c])
        h.addcmul_(decay, start[:, None])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # g_t = ∂L/∂h_t + a_{t+1} g_{t+1};   ∂L/∂b_t = g_t;   ∂L/∂a_t = g_t h_{t−1}
        a, h = ctx.saved_tensors
        g, decay = torch.empty_like(h), torch.empty_like(a)
        gs, decays, gates, outer = g.unbind(1), decay.unbind(1), a.unbind(1), grads[0].unbind(1)
        gs[-1].copy_(outer[-1])
        decays[-1].fill_(1.0)
        for t in range(len(gs) - 2, -1, -1):
            torch.addcmul(outer[t], gates[t + 1], gs[t + 1], out=gs[t])
            torch.mul(gates[t + 1], decays[t + 1], out=decays[t])
        start = torch.zeros_like(g[:, 0])
        for c in range(len(g) - 2, -1, -1):
            torch.addcmul(g[c + 1, 0], decay[c + 1, 0], start[c + 1], out=start[c]).mul_(
                a[c + 1, 0]
            )
        g.addcmul_(decay, start[:, None])
        grad_a = torch.zeros_like(a)
        torch.mul(g.flatten(0, 1)[1:], h.flatten(0, 1)[:-1], out=grad_a.flatten(0, 1)[1:])
        return grad_a, g


class _Fused(torch.autograd.Function):
    """The same as one kernel: a lane a sequence, which keeps its state in a register and reads each
    number once.

    With worlds × width lanes there is enough to do without splitting time, so memory bandwidth is
    the limit.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        h = torch.empty_like(b)
        _launch("forward", a, b, h)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(a)
        _launch("backward", a, h, grads[0].contiguous(), grad_a, grad_b)
        return grad_a, grad_b


LANES = 128
"""Sequences a program."""


def _launch(name: str, *tensors: Tensor) -> None:
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("there is no Triton here")
    time, lanes = len(tensors[0]), tensors[0][0].numel()
    getattr(kernels, name)[(math.ceil(lanes / LANES),)](*tensors, time, lanes, LANES)


@cache
def _kernels() -> Any:
    """Return the module of Triton kernels; None where Triton, which comes with torch's CUDA builds,
    is missing.
    """
    try:
        from metarobot.learning import linear_recurrence_kernels as scan_kernels
    except ImportError:
        return None
    return scan_kernels
