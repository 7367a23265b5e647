"""Returns, advantages and the statistics of returns, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    cut: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Estimate advantages, ``(time, world)`` (Schulman et al. 2016, eq. 16).

    ``next_value`` is the value of the observation each step led to; it is ignored where
    ``terminated``. ``cut`` is true where the trace ends (an episode's end, or only the trial's), so
    a time limit still bootstraps.
    """
    # δ_t = r_t + γ V(s_{t+1}) − V(s_t),   A_t = δ_t + γλ A_{t+1}
    delta = reward + gamma * next_value * (~terminated) - value
    trace = gamma * lam * (~(cut | terminated)).to(delta.dtype)
    advantage = torch.empty_like(delta)
    carry = delta.new_zeros(delta.shape[1:])
    for t in range(len(delta) - 1, -1, -1):
        carry = torch.addcmul(delta[t], trace[t], carry)
        advantage[t] = carry
    return advantage


def discounted(reward: Tensor, gamma: float, start: Tensor | None = None) -> Tensor:
    """Accumulate past rewards, ``R_t = γ R_{t−1} + r_t``, ``(time, world)``: the signal whose
    spread scales rewards.
    """
    total = torch.zeros_like(reward[0]) if start is None else start
    out = torch.empty_like(reward)
    for t in range(len(reward)):
        total = gamma * total + reward[t]
        out[t] = total
    return out


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target): 1 is a perfect critic, 0 is one that predicts the
    mean.
    """
    return 1.0 - (target - value).var() / target.var().clamp_min(1e-8)


def linear_baseline(
    x: Tensor, to_go: Tensor, valid: Tensor, tasks: int, ridge: float = 1e-3
) -> Tensor:
    """Fit returns-to-go by observation and time, task by task; return the predictions ``(time,
    world)``.

    Ridge regression on the features ``[x, x², t, t², t³, 1]`` with t in hundreds of steps (Duan et
    al. 2016, section 3): a critic that needs no training, for a task of which a few rollouts are
    all there is. ``x`` ``(time, world, feature)`` is normalised; the worlds of a task stand
    together; only ``valid`` steps are fitted; ``ridge`` is relative to their number.
    """
    x = x.double()
    t = (torch.arange(len(x), dtype=x.dtype, device=x.device) / 100)[:, None, None].expand(
        *x.shape[:2], 1
    )
    features = torch.cat([x, x.square(), t, t**2, t**3, torch.ones_like(t)], -1)
    features = features.view(len(x), tasks, x.shape[1] // tasks, features.shape[-1])
    rows = (features * valid.view(*features.shape[:-1], 1)).transpose(0, 1).flatten(1, 2)
    target = to_go.to(x.dtype).view(features.shape[:-1]).transpose(0, 1).flatten(1)
    gram = rows.mT @ rows
    steps = gram[:, -1, -1].clamp_min(1.0)
    gram.diagonal(dim1=1, dim2=2).add_(ridge * steps[:, None])
    weights = torch.linalg.solve(gram, rows.mT @ target[..., None])
    fitted = torch.einsum("twrf,wf->twr", features, weights[..., 0])
    return fitted.flatten(1).to(to_go.dtype)
