import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from helpers import FALLING, TASKS, run, same, tiny_run
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from metarobot.agent import Shapes
from metarobot.agents import posterior as gaussians
from metarobot.agents.pearl import PEARL, PEARLConfig, Twins, squashed
from metarobot.agents.replay import Steps
from metarobot.checkpoint import build_learner, family_shapes
from metarobot.collect import collect
from metarobot.distributions import Uniform
from metarobot.env import Env, Family, families
from metarobot.tasks import Param, TaskSpace
from metarobot.types import MetarobotError, Percept, Rollout, Trials

SMALL = {"worlds": 2, "width": 16, "tasks": 4, "batch": 4, "context": 8, "gradient_steps": 3, "replay": 10_000}


def build(family: Family = FALLING, **settings: Any) -> PEARL:
    learner = build_learner("pearl", PEARLConfig(**SMALL | settings), family, 0)
    assert isinstance(learner, PEARL)
    return learner


def live(learner: PEARL, tasks: Any = TASKS, family: Family = FALLING, seed: int = 0, **settings: Any) -> Trials:
    usual = {"episodes": learner.config.episodes, "seed": seed}
    return collect(learner.agent, Env(family, tasks, threads=1), tasks, **usual | settings)


def skilled(**settings: Any) -> PEARL:
    """A learner whose normalisers have seen data and whose weights are far from those it was born with."""
    learner = build(**settings)
    learner.update(live(learner), 0.0, 0)
    with torch.no_grad():
        for p in learner.agent.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return learner


def drawn(tasks: int, steps: int, seed: int = 0) -> Steps:
    g = torch.Generator().manual_seed(seed)
    sizes = (17, 6, 0, 0, 17)
    return Steps(*(torch.randn(*(tasks, steps, n) if n else (tasks, steps), generator=g) for n in sizes))


def close(a: tuple[Tensor, ...], b: tuple[Tensor, ...], **tolerance: float) -> bool:
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_posterior_is_the_normalised_product_of_prior_and_factors(steps: int) -> None:
    agent, lived = skilled(latent=2).agent.double(), drawn(1, steps)
    lived = Steps(*(x.double() for x in lived))
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    for dim in range(2):
        log_density = -0.5 * z.square()
        for i in range(steps):
            weighted, precision = agent.evidence(Steps(*(x[:, i : i + 1] for x in lived)), None, 1)
            mean, std = weighted / precision, precision.rsqrt()
            log_density = log_density + Normal(mean[0, dim], std[0, dim]).log_prob(z)
        density = torch.softmax(log_density, 0)
        mean = (density * z).sum()
        got = agent.infer(lived)
        assert got.mean[0, dim].item() == pytest.approx(mean.item(), abs=1e-6)
        assert got.var[0, dim].item() == pytest.approx((density * (z - mean).square()).sum().item(), rel=1e-5)


def test_before_anything_was_lived_the_posterior_is_the_prior() -> None:
    agent = build().agent
    mean, var = agent.posterior(agent.begin(3))
    assert torch.equal(mean, torch.zeros(3, 5))
    assert torch.equal(var, torch.ones(3, 5))
    assert close(agent.infer(drawn(3, 0)), (mean, var))


def test_the_order_of_transitions_and_of_episodes_does_not_matter() -> None:
    learner = skilled()
    agent, (first, second, _) = learner.agent, live(learner).episodes
    start = agent.begin(2)
    there = agent.adapt(agent.adapt(start, first), second)
    back = agent.adapt(agent.adapt(start, second), first)
    assert close(there, back, rtol=1e-5, atol=1e-5)
    assert not close(agent.adapt(start, first), there, rtol=1e-2)
    lived, order = drawn(2, 50), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = Steps(*(x[:, order] for x in lived))
    assert close(agent.infer(lived), agent.infer(shuffled), rtol=1e-5, atol=1e-6)


def test_adapting_by_episodes_equals_inferring_from_all_their_transitions_at_once() -> None:
    learner = skilled()
    trials, agent = live(learner), learner.agent
    context = agent.begin(2)
    for episode in trials.episodes:
        context = agent.adapt(context, episode)
    held, ends = learner.replay, torch.tensor([sum(int(e.valid[:, w].sum()) for e in trials.episodes) for w in (0, 1)])
    for world in (0, 1):
        row, slots = torch.tensor([len(held) - 2 + world]), []
        for k, e in enumerate(trials.episodes):
            slots += [k * (FALLING.horizon + 1) + t for t in range(int(e.valid[:, world].sum()))]
        assert len(slots) == ends[world]
        fresh = build()
        fresh.replay.add(trials)
        row = torch.tensor([world * fresh.replay.steps(torch.zeros(1, dtype=torch.int64)).obs.shape[0]])
        picked = (world * 3 * (FALLING.horizon + 1) + torch.tensor(slots))[None]
        got = agent.infer(fresh.replay.steps(picked))
        want = agent.posterior(context)
        assert close((got.mean[0], got.var[0]), (want.mean[world], want.var[world]), rtol=1e-4, atol=1e-5)
        del row


def test_what_stands_in_the_padding_changes_nothing() -> None:
    learner = skilled()
    episode = next(e for e in live(learner).episodes if not e.valid.all())
    agent, start = learner.agent, learner.agent.begin(2)
    clean = agent.adapt(start, episode)
    for value in (7.0, float("nan")):
        names = ("obs", "action", "reward")
        hidden = {k: _outside(getattr(episode, k), episode.valid, value) for k in names}
        assert same(dict(enumerate(agent.adapt(start, replace(episode, **hidden)))), dict(enumerate(clean)))


def _outside(x: Tensor, valid: Tensor, value: float) -> Tensor:
    return torch.where(valid if x.dim() == 2 else valid[..., None], x, value)


def test_adapting_is_pure_and_an_episode_narrows_the_posterior() -> None:
    learner = skilled()
    agent, episode = learner.agent, live(learner).episodes[0]
    start = agent.begin(2)
    before = tuple(x.clone() for x in start)
    after = agent.adapt(start, episode)
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
    assert (agent.posterior(after).var < agent.posterior(start).var).all()


def percept(done: float = 0.0, first: float = 0.0) -> Percept:
    obs = torch.randn(2, 17, generator=torch.Generator().manual_seed(3))
    one = torch.ones(2)
    return Percept(obs, torch.zeros(2, 6), one, done * one, first * one)


def test_z_is_drawn_at_an_episodes_first_step_and_kept() -> None:
    learner = skilled()
    agent, noise = learner.agent, torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    told = agent.adapt(agent.begin(2), live(learner).episodes[0])
    mean, var = agent.posterior(told)
    for start in (percept(first=1.0), percept(done=1.0)):
        assert torch.equal(agent.act(start, told)[1][2], mean)
        assert torch.equal(agent.act(start, told, noise)[1][2], mean + var.sqrt() * noise[:, 6:])
    _, kept = agent.act(percept(first=1.0), told, noise)
    for other in (None, -noise):
        assert torch.equal(agent.act(percept(), kept, other)[1][2], kept[2])
    assert all(torch.equal(a, b) for a, b in zip(kept[:2], told[:2], strict=True))


def test_actions_depend_on_z_and_stay_within_their_bounds() -> None:
    shapes = Shapes(obs=17, act=6, task=1, episodes=3, horizon=12, low=(-4.0,) * 6, high=(2.0,) * 6)
    agent = PEARL(PEARLConfig(**SMALL), shapes).agent
    nn.init.constant_(agent.actor[-1].bias, 0.3)
    zeros = torch.zeros(2, 5)
    with torch.no_grad():
        agent.actor[0].weight[:, 17:] += 1.0
        action, _ = agent.act(percept(), (zeros, zeros + 1, zeros))
        other, _ = agent.act(percept(), (zeros, zeros + 1, zeros + 2))
        wild, _ = agent.act(percept(), (zeros, zeros + 1, zeros), torch.full((2, 11), 50.0))
    assert not torch.allclose(action, other)
    assert torch.allclose(wild, torch.tensor(2.0))
    assert torch.allclose(agent.centred(action), torch.tanh(torch.tensor(0.3)), atol=0.1)
    assert torch.equal(agent.centred(torch.tensor([-4.0, -1.0, 2.0]).repeat(2)), torch.tensor([-1.0, 0.0, 1.0]).repeat(2))


def test_a_family_tells_its_bounds_and_its_horizon() -> None:
    shapes = family_shapes(families.get("QuadrupedFlat"), 2)
    assert shapes.horizon == 200
    assert shapes.low == (-4.0,) * 12
    assert shapes.high == (4.0,) * 12


def test_exploring_draws_noise_for_z_too() -> None:
    learner = skilled()
    quiet, noisy = (live(learner, explore=x, seed=4) for x in (False, True))
    assert torch.equal(quiet.episodes[0].obs[0], noisy.episodes[0].obs[0])
    noise = torch.randn(12, 2, 11, generator=torch.Generator().manual_seed(4))
    agent, first = learner.agent, noisy.episodes[0]
    zeros = torch.zeros(2)
    told = Percept(first.obs[0], torch.zeros(2, 6), zeros, zeros, zeros + 1)
    assert torch.equal(first.action[0], agent.act(told, agent.begin(2), noise[0])[0])


@pytest.mark.parametrize("log_std", [-3.0, 0.0, 1.0])
def test_the_log_density_of_a_squashed_action_is_torchs(log_std: float) -> None:
    g = torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(50, 3, generator=g, dtype=torch.float64) for _ in range(2))
    std = torch.full_like(mean, log_std)
    action, density = squashed(mean, std, noise)
    truth = TransformedDistribution(Normal(mean, std.exp()), [TanhTransform(cache_size=1)])
    u = mean + std.exp() * noise
    assert torch.equal(action, torch.tanh(u))
    exact = Normal(mean, std.exp()).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, action)
    assert torch.allclose(density, exact.sum(-1), atol=1e-9)
    inside = action.abs().amax(-1) < 0.999
    assert inside.any()
    assert torch.allclose(density[inside], truth.log_prob(action[inside] * 1.0).sum(-1), atol=1e-6)


def test_twin_critics_equal_two_perceptrons() -> None:
    torch.manual_seed(0)
    twins = Twins(9, 8)
    x = torch.randn(20, 9)
    for i, value in enumerate(twins(x)):
        h = x
        for k, (w, b) in enumerate(zip(twins.weights, twins.biases, strict=True)):
            h = (torch.relu(h) if k else h) @ w[i] + b[i]
        assert torch.allclose(value, h[:, 0], atol=1e-6)
    assert not torch.allclose(twins(x)[0], twins(x)[1])


def test_the_actors_loss_reaches_no_critic() -> None:
    torch.manual_seed(0)
    twins, x = Twins(9, 8), torch.randn(20, 9, requires_grad=True)
    learning, given = twins(x), twins(x, learns=False)
    assert torch.equal(learning, given)
    slopes = torch.autograd.grad(given.sum(), [x, *twins.parameters()], allow_unused=True)
    assert slopes[0].abs().sum() > 0
    assert all(s is None for s in slopes[1:])
    assert all(s.abs().sum() > 0 for s in torch.autograd.grad(learning.sum(), [x, *twins.parameters()]))


def test_target_critics_follow_by_tau() -> None:
    learner = build(tau=0.25, gradient_steps=1)
    old = [p.detach().clone() for p in learner.targets.parameters()]
    learner.update(live(learner), 0.0, 0)
    for before, target, critic in zip(old, learner.targets.parameters(), learner.critics.parameters(), strict=True):
        assert torch.allclose(target, 0.75 * before + 0.25 * critic, atol=1e-7)
        assert not torch.equal(target, before)
        assert not target.requires_grad
