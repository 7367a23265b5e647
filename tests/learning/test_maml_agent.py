import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import (
    IN_TIME,
    ROLLOUTS,
    SHAPES,
    STEADY,
    TASKS,
    adapted,
    build,
    changed,
    collect_trials,
    directional_derivative,
    directions,
    episode,
    example_trials,
    fill,
    in_float64,
    initial,
    same,
)
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call, vmap

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.maml_agent import GradientAgent, InnerBatch, by_task, valid_mask
from metarobot.learning.meta_gradient import first_order_derivatives, per_task_gradients
from metarobot.learning.returns import linear_baseline
from metarobot.types import Percept, Rollout


def worlds(rollout: Rollout, chosen: slice) -> Rollout:
    """Some of a rollout's worlds."""
    return replace(
        rollout,
        **{k: getattr(rollout, k)[:, chosen] for k in IN_TIME},
        final_obs=rollout.final_obs[chosen],
        faulted=rollout.faulted[chosen],
        terms={},
    )


def parts(agent: GradientAgent, weights: Tensor) -> dict[str, Tensor]:
    """Name one task's weights ``(P,)`` as the policy does."""
    named = list(agent.policy.named_parameters())
    flat = weights.split([p.numel() for _, p in named])
    return {k: w.view_as(p) for (k, p), w in zip(named, flat, strict=True)}


def policy(agent: GradientAgent, weights: Tensor, x: Tensor) -> Independent:
    """One task's policy."""
    mean, log_std = functional_call(agent.policy, parts(agent, weights), (x,))
    return Independent(Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize(("episodes", "inner_steps"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_the_meta_gradient_equals_finite_differences(episodes: int, inner_steps: int) -> None:
    learner, vector, support, query = in_float64(
        "maml", episodes, inner_steps=inner_steps, inner_lr=0.05 / inner_steps
    )
    agent = learner.agent
    trajectory = agent.adapt_meta_parameters(vector, support)
    assert len(trajectory.steps) == (episodes - 1) * inner_steps
    gradient = agent.meta_vjp(
        trajectory, per_task_gradients(agent.surrogate, trajectory.weights, query)
    )

    def end(x: Tensor) -> Tensor:
        return agent.adapt_meta_parameters(x, support).weights

    def outer(x: Tensor) -> Tensor:
        return vmap(agent.surrogate)(end(x), query).mean()

    for v in directions(4, agent.weight_count):
        for side in (torch.cat([v * vector[: agent.weight_count], 0 * v]), torch.cat([0 * v, v])):
            scale = float(gradient.norm() * side.norm())
            assert float(gradient @ side) == pytest.approx(
                float(directional_derivative(outer, vector, side)), abs=1e-6 * scale
            )
            moved = agent.meta_jvp(trajectory, side)
            assert torch.allclose(
                moved,
                directional_derivative(end, vector, side),
                rtol=0,
                atol=1e-6 * float(moved.norm()),
            )


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_adapting_is_gradient_ascent_task_by_task(inner_steps: int) -> None:
    agent = build("maml", inner_steps=inner_steps).agent.double()
    vector = agent.meta_parameters()
    vector[: agent.weight_count] *= torch.rand(agent.weight_count, dtype=vector.dtype)
    agent.set_meta_parameters(vector)
    _, rates = agent.split_meta_parameters(vector)
    batch, together = agent.batch(initial(agent), episode()), adapted(agent, episode())
    for i in range(len(TASKS)):
        weights = initial(agent)[i].clone()
        for _ in range(inner_steps):
            weights.requires_grad_()
            ratio = (
                policy(agent, weights, batch.x[i]).log_prob(batch.action[i]) - batch.old_log_prob[i]
            ).exp()
            (gradients,) = torch.autograd.grad(
                (batch.step_weight[i] * ratio * batch.advantage[i]).sum(), weights
            )
            weights = (weights + rates * gradients).detach()
        assert torch.allclose(together[i], weights, rtol=1e-11, atol=1e-12)


def test_many_tasks_at_once_equal_one_after_the_other() -> None:
    agent = build("maml").agent.double()
    trials, both = example_trials(), initial(agent)
    batch, after = agent.batch(both, episode()), adapted(agent, episode())
    trajectory = agent.adapt_meta_parameters(agent.meta_parameters(), [batch])
    query = agent.batch(after, trials.episodes[1])
    gradients = per_task_gradients(agent.surrogate, trajectory.weights, query)
    vjp, jvp = trajectory.vjp(gradients), agent.meta_jvp(trajectory, agent.meta_parameters())
    for i in range(len(TASKS)):
        rollout = worlds(episode(), slice(ROLLOUTS * i, ROLLOUTS * (i + 1)))
        alone = agent.batch(both[:1], rollout)
        for x, y in zip(alone, batch, strict=True):
            assert torch.allclose(x, y[i : i + 1], rtol=1e-9, atol=1e-10)
        single = InnerBatch(*(x[i : i + 1] for x in batch))
        short = agent.adapt_meta_parameters(agent.meta_parameters(), [single])
        shown = InnerBatch(*(x[i : i + 1] for x in query))
        assert torch.allclose(adapted(agent, rollout)[0], after[i], rtol=1e-10, atol=1e-11)
        assert torch.allclose(
            agent.surrogate(after[i], InnerBatch(*(x[i] for x in query))),
            vmap(agent.surrogate)(after, query)[i],
        )
        assert torch.allclose(
            per_task_gradients(agent.surrogate, short.weights, shown)[0],
            gradients[i],
            rtol=1e-10,
            atol=1e-11,
        )
        assert torch.allclose(
            agent.meta_jvp(short, agent.meta_parameters())[0], jvp[i], rtol=1e-10, atol=1e-11
        )
        for x, y in zip(short.vjp(gradients[i : i + 1]), vjp, strict=True):
            assert torch.allclose(x[0], y[i], rtol=1e-10, atol=1e-11)


def test_a_batch_holds_the_advantages_and_the_policy_that_acted() -> None:
    agent = build("maml").agent.double()
    e, c, weights = episode(), agent.config, adapted(agent, episode())
    batch = agent.batch(weights, e)
    reward, nothing = e.reward.double(), torch.zeros_like(e.reward.double())
    to_go, advantage = nothing.clone(), nothing.clone()
    lengths = e.valid.sum(0).tolist()
    for w, n in enumerate(lengths):
        for t in range(n):
            to_go[t, w] = sum(c.gamma ** (s - t) * reward[s, w] for s in range(t, n))
    value = linear_baseline(agent.norm(e.obs.double()), to_go, e.valid, len(TASKS))
    for w, n in enumerate(lengths):
        v = torch.cat([value[:n, w], nothing[:1, 0]])
        delta = reward[:n, w] + c.gamma * v[1:] - v[:-1]
        for t in range(n):
            advantage[t, w] = sum((c.gamma * c.lam) ** (s - t) * delta[s] for s in range(t, n))
    for i in range(len(TASKS)):
        mine = slice(ROLLOUTS * i, ROLLOUTS * (i + 1))
        mask = by_task(e.valid[:, mine], 1)[0]
        share = mask.double() / mask.sum()
        raw = by_task(advantage[:, mine], 1)[0][mask]
        assert torch.allclose(
            batch.advantage[i][mask], (raw - raw.mean()) / raw.std(correction=0), atol=1e-5
        )
        assert torch.allclose(batch.step_weight[i], share)
        assert not batch.advantage[i][~mask].any()
        acted = policy(agent, weights[i], by_task(agent.norm(e.obs[:, mine].double()), 1)[0])
        old = acted.log_prob(by_task(e.action[:, mine].double(), 1)[0])
        assert torch.allclose(batch.old_mean[i][mask], acted.mean[mask], atol=1e-12)
        assert torch.allclose(batch.old_log_prob[i][mask], old[mask], atol=1e-10)
        assert torch.allclose(batch.old_log_std[i, 0].exp(), acted.stddev[0])


def test_the_divergence_is_that_of_the_policies() -> None:
    agent = build("maml").agent.double()
    batch, moved = (
        agent.batch(initial(agent), episode()),
        initial(agent) + 0.1 * directions(2, agent.weight_count),
    )
    found, none = (
        vmap(agent.divergence)(moved, batch),
        vmap(agent.divergence)(initial(agent), batch),
    )
    assert torch.allclose(none, torch.zeros_like(none), atol=1e-14)
    for i in range(len(TASKS)):
        kl = kl_divergence(
            policy(agent, initial(agent)[i], batch.x[i]), policy(agent, moved[i], batch.x[i])
        )
        assert torch.allclose(found[i], (batch.step_weight[i] * kl).sum(), rtol=1e-10)


def test_batches_are_of_the_weights_that_acted() -> None:
    agent, noise = build("maml").agent, torch.Generator().manual_seed(0)
    trials = collect_trials(agent, STEADY, episodes=3)
    batches = agent.batches(trials)
    for e, batch in zip(trials.episodes, batches, strict=True):
        drawn = torch.randn(e.action.shape, generator=noise)
        acted = e.action - drawn * batch.old_log_std.exp().repeat_interleave(ROLLOUTS, 0)[:, 0]
        assert torch.allclose(batch.old_mean, by_task(acted, 2), atol=1e-5)
        for i, rows in enumerate(batch.action):
            mine = range(ROLLOUTS * i, ROLLOUTS * (i + 1))
            assert torch.equal(rows, torch.cat([e.action[:, w] for w in mine]))
    assert not any(torch.allclose(a.old_mean, b.old_mean, atol=1e-2) for a, b in pairwise(batches))


def test_thinning_keeps_one_step_in_n_and_shares_that_add_up() -> None:
    agent = build("maml").agent
    batch = agent.batch(initial(agent), episode())
    thin = batch.thin(4)
    assert torch.equal(thin.x, batch.x[:, ::4])
    assert torch.equal(thin.advantage, batch.advantage[:, ::4])
    kept = batch.step_weight[:, ::4]
    assert torch.allclose(thin.step_weight.sum(1), torch.ones(2))
    assert torch.allclose(thin.step_weight, kept / kept.sum(1, keepdim=True))
    assert torch.equal(thin.old_log_std, batch.old_log_std)
    assert all(
        torch.allclose(x, y, rtol=1e-6, atol=0.0) for x, y in zip(batch.thin(1), batch, strict=True)
    )


def test_thinning_takes_from_every_rollout() -> None:
    agent = build("maml", worlds=8, rollouts=4).agent
    rollout = collect_trials(agent, STEADY).episodes[0]
    when = torch.arange(12.0)[:, None] + 100 * torch.arange(8.0)
    batch = agent.batch(initial(agent), rollout)._replace(advantage=by_task(when, 2))
    kept = [[100 * w + t for w in task for t in (0, 4, 8)] for task in (range(4), range(4, 8))]
    assert batch.thin(4).advantage.tolist() == kept


def test_the_trajectory_ends_where_the_agent_adapts_to() -> None:
    agent = build("maml", inner_steps=2, episodes=3).agent
    trials = example_trials(3)
    support = agent.batches(trials)[:2]
    context = agent.begin(2)
    for e in trials.episodes[:2]:
        context = agent.adapt(context, e)
    for derivative in ({}, {"derivatives": first_order_derivatives}):
        assert torch.allclose(
            agent.adapt_meta_parameters(agent.meta_parameters(), support, **derivative).weights,
            context[0],
            atol=1e-6,
        )


def test_adapting_leaves_the_context_and_the_episode_as_they_were() -> None:
    agent, e = build("maml", inner_steps=3).agent, episode()
    context = agent.begin(2)
    before, kept = (
        context[0].clone(),
        {k: v.clone() for k, v in vars(e).items() if isinstance(v, Tensor)},
    )
    state = {k: v.clone() for k, v in agent.state_dict().items()}
    (first,), (again,) = (agent.adapt(context, e) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, before)
    assert torch.equal(context[0], before)
    assert same(agent.state_dict(), state)
    assert all(torch.equal(getattr(e, k), v) for k, v in kept.items())
    assert not first.requires_grad


def test_adapting_uses_nothing_but_observations_actions_and_rewards() -> None:
    agent, e = build("maml").agent, episode()
    expected = adapted(agent, e)
    padding = ~e.valid
    torch.manual_seed(99)
    other = changed(
        replace(e, final_obs=torch.full_like(e.final_obs, math.nan), faulted=~e.faulted, terms={}),
        obs=fill(padding, 7.0),
        action=fill(padding, -3.0),
        reward=fill(padding, 100.0),
    )
    assert torch.allclose(adapted(agent, other), expected, atol=1e-7)
    assert torch.allclose(
        adapted(agent, changed(e, reward=fill(padding, math.nan))), expected, atol=1e-7
    )
    for k in ("obs", "action", "reward"):
        assert not torch.allclose(
            adapted(agent, changed(e, **{k: lambda x: x[1].mul_(-2.0)})), expected, atol=1e-5
        )


def test_another_tasks_rollouts_change_nothing_in_this_task() -> None:
    agent, e = build("maml").agent, episode()
    mine, other = slice(0, ROLLOUTS), (slice(None), slice(ROLLOUTS, None))
    expected = adapted(agent, e)
    for rollout in (
        changed(e, reward=fill(other, 3.0)),
        changed(e, reward=lambda x: x[other].mul_(-100.0), obs=lambda x: x[other].mul_(2.0)),
        changed(e, obs=fill(other, math.nan)),
        changed(e, valid=fill(other, False)),
    ):
        after = adapted(agent, rollout)
        assert torch.allclose(after[0], expected[0], atol=1e-7)
        assert not torch.allclose(after[1], expected[1], atol=1e-4)
    assert torch.allclose(adapted(agent, worlds(e, mine))[0], expected[0], atol=1e-7)


def test_how_long_other_episodes_last_changes_nothing_in_this_task() -> None:
    agent, e = build("maml", inner_lr=1.0).agent, episode()
    padded = replace(
        e, **{k: torch.cat([x, torch.zeros_like(x[:9])]) for k in IN_TIME for x in [getattr(e, k)]}
    )
    assert torch.allclose(adapted(agent, padded), adapted(agent, e), atol=1e-5)


def test_small_steps_climb_the_surrogate() -> None:
    agent = build("maml", inner_steps=4, inner_lr=0.02).agent
    batch = agent.batch(initial(agent), episode())
    trajectory = agent.adapt_meta_parameters(agent.meta_parameters(), [batch])
    heights = [vmap(agent.surrogate)(trajectory.first(k).weights, batch) for k in range(5)]
    assert heights[0].abs().max() < 1e-5
    assert all((b > a).all() for a, b in pairwise(heights))
    assert torch.allclose(trajectory.weights, adapted(agent, episode()), atol=1e-7)


BROKEN = {
    f"{k} {v}": {k: fill((2, 1), v)}
    for k in ("reward", "obs", "action")
    for v in (math.nan, math.inf, -math.inf)
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_rollout_with_a_broken_number_is_not_adapted_to(broken: dict[str, Any]) -> None:
    agent = build("maml").agent
    rollout, without = (
        changed(episode(), **broken),
        changed(episode(), valid=fill((slice(None), 1), False)),
    )
    assert valid_mask(rollout)[:, 1].sum() == 0
    assert torch.equal(adapted(agent, rollout), adapted(agent, without))
    assert adapted(agent, rollout).isfinite().all()
    assert not torch.equal(adapted(agent, rollout), adapted(agent, episode()))


def test_a_task_without_a_valid_rollout_keeps_its_weights_and_the_others_adapt() -> None:
    agent, last = build("maml").agent, (slice(None), slice(ROLLOUTS, None))
    for change in (
        {"valid": fill(last, False)},
        {"reward": fill(last, math.nan)},
        {"reward": fill(last, 0.0)},
    ):
        after = adapted(agent, changed(episode(), **change))
        assert torch.equal(after[1], initial(agent)[1])
        assert torch.allclose(after[0], adapted(agent, episode())[0], atol=1e-7)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("maml", {"inner_lr": 0.0}, "inner_lr must be between 1e-06 and 100, not 0"),
        ("maml", {"inner_lr": -1.0}, "inner_lr .*not -1"),
        ("promp", {"inner_lr": 1e9}, r"inner_lr .*not 1e\+09"),
        ("promp", {"inner_lr": math.nan}, "inner_lr .*not nan"),
        ("reptile", {"inner_steps": 0}, "inner_steps must be between 1 and 100, not 0"),
        ("maml", {"inner_steps": 1000}, "inner_steps .*not 1000"),
        ("maml-ppo", {"episodes": 1}, "episodes must be at least 2.*not 1"),
        ("fomaml", {"worlds": 7}, "worlds = 7 is not a multiple of rollouts = 3"),
        ("maml", {"gamma": 1.5}, "gamma must be between 0 and 1, not 1.5"),
        ("maml", {"lam": -0.1}, "lam must be between 0 and 1, not -0.1"),
        ("maml", {"std": 0.0}, "std must be between .*not 0"),
        ("reptile", {"learn_rates": True}, "learn_rates"),
    ],
)
def test_settings_that_cannot_work_are_named(
    name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(MetarobotError, match=words) as raised:
        build(name, **settings)
    assert "\n" not in str(raised.value)


def percept(agent: GradientAgent) -> Percept:
    obs = torch.randn(
        len(TASKS) * agent.config.rollouts, 17, generator=torch.Generator().manual_seed(3)
    )
    zeros = torch.zeros(len(obs))
    return Percept(obs, torch.zeros(len(obs), 6), zeros, zeros, zeros)


def test_each_tasks_worlds_act_by_its_own_weights() -> None:
    agent = build("maml").agent
    agent.norm.update(3 * torch.randn(50, 17))
    seen, context = percept(agent), agent.adapt(agent.begin(2), episode())
    context = (context[0] + 0.3 * directions(2, agent.weight_count).float(),)
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
    (mean, after), (noisy, _) = agent.act(seen, context), agent.act(seen, context, noise)
    assert after is context
    for w in range(6):
        expected = policy(agent, context[0][w // ROLLOUTS], agent.norm(seen.obs[w]))
        assert torch.allclose(mean[w], expected.mean, atol=1e-6)
        assert torch.allclose(noisy[w], expected.mean + expected.stddev * noise[w], atol=1e-6)
    other = torch.stack([context[0][0], initial(agent)[1]])
    swapped, _ = agent.act(seen, (other,))
    assert torch.equal(swapped[:3], mean[:3])
    assert not torch.allclose(swapped[3:], mean[3:], atol=1e-2)


def test_a_trial_begins_with_the_initial_weights_in_every_task() -> None:
    agent = build("maml").agent
    (weights,) = agent.begin(5)
    expected = nn.utils.parameters_to_vector(agent.policy.parameters())
    assert weights.shape == (5, agent.weight_count)
    assert all(torch.equal(w, expected) for w in weights)
    assert not weights.requires_grad
    vector = torch.randn(2 * agent.weight_count)
    agent.set_meta_parameters(vector)
    assert torch.equal(agent.meta_parameters(), vector)
    assert torch.equal(agent.split_meta_parameters(vector)[0], agent.begin(1)[0][0])


@pytest.mark.parametrize("width", [8, 16])
def test_another_policy_can_be_fine_tuned(width: int) -> None:
    agent, kind = build("maml").agent, agents.get("blind")
    source = kind.build(kind.config(width=width), SHAPES).agent
    source.norm.update(3 * torch.randn(50, 17))
    with torch.no_grad():
        for p in source.parameters():
            p += 0.2 * torch.randn_like(p)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (agent, source)]
    tuned, seen = agent.fine_tuned_from(source, 0.1), percept(agent)
    assert torch.allclose(
        tuned.split_meta_parameters(tuned.meta_parameters())[1],
        torch.full((tuned.weight_count,), 0.1),
    )
    context = tuned.begin(2)
    action, _ = tuned.act(seen, context)
    assert torch.allclose(action, source.act(seen, ())[0], atol=1e-6)
    noise = torch.ones(6, 6)
    assert torch.allclose(
        tuned.act(seen, context, noise)[0], source.act(seen, (), noise)[0], atol=1e-6
    )
    (after,) = tuned.adapt(context, episode())
    batch = tuned.batch(context[0], episode())
    assert torch.allclose(
        after, context[0] + 0.1 * per_task_gradients(tuned.surrogate, context[0], batch), atol=1e-6
    )
    assert not torch.allclose(after, context[0], atol=1e-3)
    assert not torch.allclose(tuned.act(seen, (after,))[0], action, atol=1e-3)
    trials = collect_trials(tuned)
    assert trials.episodes[1].action.isfinite().all()
    for m, kept in zip((agent, source), before, strict=True):
        assert same(m.state_dict(), kept)
    assert initial(agent).shape[1] == agent.weight_count
    assert (width == 8) == (tuned.weight_count == agent.weight_count)
