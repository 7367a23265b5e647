"""Returns, advantages and baselines, as pure functions of collected steps."""

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
    """Estimate advantages by generalised advantage estimation (Schulman et al. 2016, eq. 16).

    All tensors and the result are ``(time, world)``.

    Args:
        reward: Reward of each step.
        value: Value of the observation at each step.
        next_value: Value of the observation that each step led to; ignored where ``terminated``.
        terminated: Whether the step ended the episode for good.
        cut: Where the trace ends otherwise: at an episode's time limit, or only at the trial's end.
            The value of the next observation is still bootstrapped.
        gamma: Discount γ.
        lam: Trace decay λ.
    """
    # δ_t = r_t + γ V(s_{t+1}) − V(s_t)
    delta = reward + gamma * next_value * (~terminated) - value

    # A_t = δ_t + γλ A_{t+1}, with no A_{t+1} where the trace ends
    trace = gamma * lam * (~(cut | terminated)).to(delta.dtype)
    advantage = torch.empty_like(delta)
    following = delta.new_zeros(delta.shape[1:])
    for t in range(len(delta) - 1, -1, -1):
        following = torch.addcmul(delta[t], trace[t], following)
        advantage[t] = following
    return advantage


def discounted(reward: Tensor, gamma: float, start: Tensor | None = None) -> Tensor:
    """Accumulate past rewards, discounted; rewards are scaled by the deviation of this signal.

    Args:
        reward: ``(time, world)``.
        gamma: Discount γ.
        start: The sum before the first step, ``(world,)``; zero if None.

    Returns:
        ``(time, world)``.
    """
    # R_t = γ R_{t−1} + r_t
    total = torch.zeros_like(reward[0]) if start is None else start
    out = torch.empty_like(reward)
    for t in range(len(reward)):
        total = gamma * total + reward[t]
        out[t] = total
    return out


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of the targets' variance that the values explain.

    1 is a perfect critic, 0 one that predicts the mean; a harmful one is below 0.
    """
    # 1 − Var(target − value) / Var(target)
    return 1.0 - (target - value).var() / target.var().clamp_min(1e-8)


def linear_baseline(
    x: Tensor, to_go: Tensor, valid: Tensor, tasks: int, ridge: float = 1e-3
) -> Tensor:
    """Fit returns-to-go by observation and time, task by task; return the predictions.

    Ridge regression on the features ``[x, x², t, t², t³, 1]`` with t in hundreds of steps (Duan et
    al. 2016, section 3): a critic that needs no training, for a task with few rollouts.

    Args:
        x: Normalised observations, ``(time, world, feature)``; a task's worlds stand together.
        to_go: Returns-to-go, ``(time, world)``.
        valid: Which steps are fitted, ``(time, world)``.
        tasks: Number of tasks.
        ridge: Weight of the penalty on the coefficients, relative to the number of steps.

    Returns:
        ``(time, world)``.
    """
    x = x.double()
    time, worlds = x.shape[:2]
    steps = torch.arange(time, dtype=x.dtype, device=x.device)
    t = (steps / 100)[:, None, None].expand(time, worlds, 1)
    features = torch.cat([x, x.square(), t, t**2, t**3, torch.ones_like(t)], -1)

    # one regression per task: rows (task, time * rollout, feature)
    features = features.view(time, tasks, worlds // tasks, features.shape[-1])
    valid_features = features * valid.view(*features.shape[:-1], 1)
    rows = valid_features.transpose(0, 1).flatten(1, 2)
    target = to_go.to(x.dtype).view(features.shape[:-1]).transpose(0, 1).flatten(1)

    # (FᵀF + ρ n I) w = Fᵀ y; the constant feature's square sums to the number of steps n
    gram = rows.mT @ rows
    step_count = gram[:, -1, -1].clamp_min(1.0)
    gram.diagonal(dim1=1, dim2=2).add_(ridge * step_count[:, None])
    weights = torch.linalg.solve(gram, rows.mT @ target[..., None])

    fitted = torch.einsum("twrf,wf->twr", features, weights[..., 0])
    return fitted.flatten(1).to(to_go.dtype)
