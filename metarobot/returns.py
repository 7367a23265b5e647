"""Returns, advantages and the statistics of returns, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, cut: Tensor, gamma: float, lam: float
) -> Tensor:
    """Estimate advantages, ``(time, world)`` (Schulman et al. 2016, eq. 16).

    ``next_value`` is the value of the observation each step led to; it is ignored where ``terminated``. ``cut`` is
    true where the trace ends (an episode's end, or only the trial's), so a time limit still bootstraps.
    """
    # δ_t = r_t + γ V(s_{t+1}) − V(s_t),   A_t = δ_t + γλ A_{t+1}
    delta = reward + gamma * next_value * (~terminated) - value
    trace = gamma * lam * (~(cut | terminated)).to(delta.dtype)
    advantage = torch.empty_like(delta)
    carry = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        carry = torch.addcmul(delta[t], trace[t], carry)
        advantage[t] = carry
    return advantage


def discounted(reward: Tensor, gamma: float, start: Tensor | None = None) -> Tensor:
    """Accumulate past rewards, ``R_t = γ R_{t−1} + r_t``, ``(time, world)``: the signal whose spread scales rewards."""
    total = torch.zeros_like(reward[0]) if start is None else start
    out = torch.empty_like(reward)
    for t in range(len(reward)):
        total = gamma * total + reward[t]
        out[t] = total
    return out


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target): 1 is a perfect critic, 0 is one that predicts the mean."""
    return 1.0 - (target - value).var() / target.var().clamp_min(1e-8)
