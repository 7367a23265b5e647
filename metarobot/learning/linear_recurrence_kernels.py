"""Triton kernels of the linear recurrence; imported only on machines with a GPU."""

import triton
import triton.language as tl


@triton.jit
def forward(a, b, h, time, lanes, WIDTH: tl.constexpr):  # noqa: N803
    """Write ``h_t = a_t h_{t−1} + b_t``; all are ``(time, lanes)``."""
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    here = lane < lanes
    state = tl.zeros((WIDTH,), tl.float32)
    for t in range(time):
        at = t * lanes + lane
        state = tl.load(a + at, here, 0.0) * state + tl.load(b + at, here, 0.0)
        tl.store(h + at, state, here)


@triton.jit
def backward(a, h, outer, grad_a, grad_b, time, lanes, WIDTH: tl.constexpr):  # noqa: N803
    """Write the gradients of ``forward``; ``outer`` is ∂L/∂h, all are ``(time, lanes)``."""
    # g_t = ∂L/∂h_t + a_{t+1} g_{t+1};   ∂L/∂b_t = g_t;   ∂L/∂a_t = g_t h_{t−1}
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    here = lane < lanes
    carried = tl.zeros((WIDTH,), tl.float32)
    for back in range(time):
        t = time - 1 - back
        at = t * lanes + lane
        g = tl.load(outer + at, here, 0.0) + carried
        before = tl.load(h + at - lanes, here & (at >= lanes), 0.0)
        tl.store(grad_a + at, g * before, here)
        tl.store(grad_b + at, g, here)
        carried = tl.load(a + at, here, 0.0) * g
