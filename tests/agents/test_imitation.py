from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers import IN_TIME, changed, directional_derivative, directions, fill, finite, same
from torch import Tensor, nn
from torch.func import functional_call

from metarobot.agents.imitation import ImitationAgent, Imitator
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Dimensions, agents
from metarobot.learning.meta_gradient import unflatten
from metarobot.training.demonstrations import demonstration_rollout
from metarobot.types import Percept, Rollout, Trials

TASKS, ROLLOUTS, TIME, OBS, ACT = 3, 4, 6, 5, 2
SHAPES = Dimensions(obs=OBS, act=ACT, task=1, episodes=2)


def build(seed: int = 0, shapes: Dimensions = SHAPES, **settings: Any) -> Imitator:
    """A learner of a small policy that does something, with rates that differ."""
    torch.manual_seed(seed)
    kind = agents.get("imitation")
    usual = {
        "worlds": TASKS * ROLLOUTS,
        "rollouts": ROLLOUTS,
        "width": 8,
        "inner_steps": 2,
        "inner_lr": 0.05,
        "early": 2,
    }
    learner = kind.build(kind.config(**usual | settings), shapes)
    with torch.no_grad():
        for p in learner.agent.actor.parameters():
            p += 0.1 * torch.randn_like(p)
        learner.agent.rates *= 0.5 + torch.rand_like(learner.agent.rates)
    return learner


@cache
def demonstration_trials() -> Trials:
    """Support and query: in every task the action is another linear function of what is seen; of
    various lengths."""
    rng = torch.Generator().manual_seed(7)
    teacher = torch.randn(TASKS, OBS, ACT, generator=rng).repeat_interleave(ROLLOUTS, 0)
    episodes = []
    for _ in range(2):
        obs = 2 * torch.randn(TIME, TASKS * ROLLOUTS, OBS, generator=rng) + 1
        valid = torch.arange(TIME)[:, None] < torch.randint(
            2, TIME + 1, (TASKS * ROLLOUTS,), generator=rng
        )
        episodes.append(
            demonstration_rollout(obs, torch.einsum("two,wof->twf", obs, teacher), valid)
        )
    assert not all(e.valid.all() for e in episodes)
    return Trials(episodes=tuple(episodes), task=torch.zeros(TASKS * ROLLOUTS, 1))


def both(change: Callable[[Rollout], Rollout]) -> Trials:
    return replace(
        demonstration_trials(), episodes=tuple(map(change, demonstration_trials().episodes))
    )


def adapted(agent: ImitationAgent, episode: Rollout) -> Tensor:
    (weights,) = agent.adapt(agent.begin(TASKS), episode)
    return weights


def error(agent: ImitationAgent, weights: Tensor, episode: Rollout) -> list[Tensor]:
    """Mean squared error of each task's own actions, and of how it guesses the end at first, over
    valid steps."""
    left, names, n = [], [k for k, _ in agent.actor.named_parameters()], agent.config.guess
    for i in range(TASKS):
        mine = slice(i * ROLLOUTS, (i + 1) * ROLLOUTS)
        valid = episode.valid[:, mine]
        own = dict(zip(names, unflatten(weights[i], agent.actor), strict=True))
        seen = agent.norm(episode.obs[:, mine])
        ends = torch.stack([seen[int(v.sum()) - 1, j, :n] for j, v in enumerate(valid.T)]).expand(
            TIME, -1, -1
        )
        action, guess = functional_call(agent.actor, own, (seen[valid], ends[valid]))
        left.append((action - episode.action[:, mine][valid]).square().mean())
        early = valid & (torch.arange(TIME) < agent.config.early)[:, None]
        guess = functional_call(agent.actor, own, (seen[early],))[1]
        left[-1] = left[-1] + (guess - ends[early]).square().sum(1).mean()
    return left


def test_adapting_by_no_steps_changes_nothing() -> None:
    agent = build(inner_steps=0).agent
    assert torch.equal(adapted(agent, demonstration_trials().episodes[0]), agent.begin(TASKS)[0])
    assert not torch.equal(
        adapted(build(inner_steps=1).agent, demonstration_trials().episodes[0]),
        agent.begin(TASKS)[0],
    )


@pytest.mark.parametrize("steps", [1, 5])
def test_adapting_lowers_every_tasks_error_on_the_support(steps: int) -> None:
    agent, support = build(inner_steps=steps).agent, demonstration_trials().episodes[0]
    before, after = (
        torch.stack(error(agent, w, support))
        for w in (agent.begin(TASKS)[0], adapted(agent, support))
    )
    assert (after < before * (0.98 if steps == 1 else 0.9)).all()


def test_an_inner_step_is_the_gradient_times_the_rates() -> None:
    agent, support = build(inner_steps=1).agent, demonstration_trials().episodes[0]
    (weights,) = agent.begin(TASKS)
    weights = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.stack(error(agent, weights, support)).sum(), weights)
    assert torch.allclose(adapted(agent, support), weights - agent.rates * gradient, atol=1e-6)


def test_adapting_is_pure() -> None:
    agent, (support, query) = build().agent, demonstration_trials().episodes
    context, state = agent.begin(TASKS), {k: v.clone() for k, v in agent.state_dict().items()}
    kept, before = context[0].clone(), {k: getattr(support, k).clone() for k in IN_TIME}
    first = agent.adapt(context, support)
    held = first[0].clone()
    agent.adapt(first, query)
    assert torch.equal(agent.adapt(context, support)[0], held)
    assert torch.equal(first[0], held)
    assert torch.equal(context[0], kept)
    assert same(agent.state_dict(), state)
    assert all(torch.equal(getattr(support, k), v) for k, v in before.items())
    assert not first[0].requires_grad


def test_adapting_again_goes_on_from_where_it_was() -> None:
    (support, query), one, two = (
        demonstration_trials().episodes,
        build(inner_steps=1).agent,
        build(inner_steps=2).agent,
    )
    assert torch.equal(
        one.adapt(one.adapt(one.begin(TASKS), support), support)[0], adapted(two, support)
    )
    assert not torch.allclose(
        one.adapt(one.adapt(one.begin(TASKS), support), query)[0], adapted(two, support)
    )


def padded(episode: Rollout, garbage: float) -> Rollout:
    """The same demonstrations with more padding, and garbage in all of it."""
    more = {k: torch.cat([x, torch.zeros_like(x)]) for k in IN_TIME for x in [getattr(episode, k)]}
    empty = ~more["valid"]
    for k in ("obs", "action"):
        more[k][empty] = garbage * torch.randn_like(more[k][empty])
    return replace(episode, **more)


@pytest.mark.parametrize("garbage", [1.0, 1e15])
def test_what_stands_in_padding_does_not_matter(garbage: float) -> None:
    learners, trials = (
        [build(), build()],
        [demonstration_trials(), both(lambda e: padded(e, garbage))],
    )
    assert torch.allclose(*(adapted(learners[0].agent, t.episodes[0]) for t in trials), atol=1e-6)
    metrics = [one.update(t, 0.0, 0) for one, t in zip(learners, trials, strict=True)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    states = [one.state() for one in learners]
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-5) for k in states[0])


def test_the_order_of_demonstrations_and_of_their_steps_does_not_matter() -> None:
    rng = torch.Generator().manual_seed(0)
    steps = torch.randperm(TIME, generator=rng)
    worlds = torch.cat(
        [i * ROLLOUTS + torch.randperm(ROLLOUTS, generator=rng) for i in range(TASKS)]
    )

    def mixed(e: Rollout) -> Rollout:
        return replace(e, **{k: getattr(e, k)[steps][:, worlds] for k in IN_TIME})

    learners = [build(guess=0) for _ in range(2)]
    assert torch.allclose(
        *(adapted(learners[0].agent, t.episodes[0]) for t in (demonstration_trials(), both(mixed))),
        atol=1e-6,
    )
    for one, trials in zip(learners, (demonstration_trials(), both(mixed)), strict=True):
        one.update(trials, 0.0, 0)
    states = [one.state() for one in learners]
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-5) for k in states[0])


def test_all_steps_of_a_task_weigh_the_same_however_they_are_spread_over_demonstrations() -> None:
    agent, support = build().agent, demonstration_trials().episodes[0]
    part = agent.demonstration_batch(support, TASKS)
    assert part.action_weight.sum(1).tolist() == pytest.approx([1.0] * TASKS)
    for i in range(TASKS):
        mine = support.valid[:, i * ROLLOUTS : (i + 1) * ROLLOUTS]
        assert part.action_weight[i].unique().tolist() == pytest.approx([0.0, 1 / int(mine.sum())])


def test_tasks_do_not_mix() -> None:
    agent, support = build().agent, demonstration_trials().episodes[0]
    other = changed(support, action=fill((slice(None), slice(ROLLOUTS, 2 * ROLLOUTS)), 3.0))
    before, after = adapted(agent, support), adapted(agent, other)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_each_task_acts_with_its_own_weights() -> None:
    agent, (support, query) = build(inner_steps=5, guess=0).agent, demonstration_trials().episodes
    context = agent.adapt(agent.begin(TASKS), support)
    zeros = torch.zeros(TASKS * ROLLOUTS)
    percept = Percept(query.obs[0], torch.zeros(TASKS * ROLLOUTS, ACT), zeros, zeros, zeros)
    action, after = agent.act(percept, context, torch.ones(TASKS * ROLLOUTS, ACT))
    assert after is context
    assert torch.equal(action, agent.act(percept, context)[0])
    off = (action - query.action[0]).square().mean(1).view(TASKS, ROLLOUTS).mean(1)
    first = replace(query, valid=torch.arange(TIME)[:, None] < torch.ones(TASKS * ROLLOUTS))
    assert torch.allclose(off, torch.stack(error(agent, context[0], first)), rtol=1e-4)


def doubled(trials: Trials) -> Trials:
    return replace(
        trials,
        episodes=tuple(
            replace(e, obs=e.obs.double(), action=e.action.double()) for e in trials.episodes
        ),
    )


def outer(agent: ImitationAgent, vector: Tensor, trials: Trials, steps: int) -> Tensor:
    """Error on the query after inner steps, differentiable in weights and rates: plain loops and
    autograd."""
    (support, query), (start, rates) = trials.episodes, vector.chunk(2)
    weights = start.expand(TASKS, -1)
    for _ in range(steps):
        loss = torch.stack(error(agent, weights, support)).sum()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights = weights - rates * gradient
    return torch.stack(error(agent, weights, query)).mean()


def exactly(steps: int, **settings: Any) -> tuple[Imitator, Tensor, Tensor]:
    """A learner in float64 after an update, the meta-parameters it started from, and the
    meta-gradient it took."""
    learner = build(inner_steps=steps, inner_lr=0.2, grad_norm=1e9, **settings)
    agent = learner.agent.double()
    vector = (
        torch.cat([nn.utils.parameters_to_vector(agent.actor.parameters()), agent.rates])
        .detach()
        .clone()
    )
    learner.update(doubled(demonstration_trials()), 0.0, 0)
    return (
        learner,
        vector,
        torch.cat([p.grad.flatten() for p in (*agent.actor.parameters(), agent.rates)]),
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_the_meta_gradient_equals_finite_differences_by_weights_and_by_rates(steps: int) -> None:
    learner, vector, gradient = exactly(steps)
    size, sides = len(vector) // 2, directions(6, len(vector))
    sides[:2, :size], sides[2:4, size:] = 0, 0

    def value(x: Tensor) -> Tensor:
        return outer(
            learner.agent, x.requires_grad_(), doubled(demonstration_trials()), steps
        ).detach()

    expected = torch.stack([directional_derivative(value, vector, v, 1e-5) for v in sides])
    assert torch.allclose(sides @ gradient, expected, rtol=1e-6, atol=1e-9)
    assert (expected.abs() > 1e-3).all()
    (reference,) = torch.autograd.grad(
        outer(learner.agent, vector.requires_grad_(), doubled(demonstration_trials()), steps),
        vector,
    )
    assert torch.allclose(gradient, reference, rtol=1e-9, atol=1e-12)


def test_first_order_leaves_second_derivatives_out_and_only_them() -> None:
    (_, vector, exact), (learner, _, plain) = exactly(1), exactly(1, first_order=True)
    size = len(vector) // 2
    assert torch.allclose(plain[size:], exact[size:], rtol=1e-9)
    assert not torch.allclose(plain[:size], exact[:size], rtol=0.05, atol=1e-3)
    agent = learner.agent
    moved = vector[:size].expand(TASKS, -1).clone().requires_grad_()
    support, query = doubled(demonstration_trials()).episodes
    (gradient,) = torch.autograd.grad(torch.stack(error(agent, moved, support)).sum(), moved)
    reached = (moved - vector[size:] * gradient).detach().requires_grad_()
    (expected,) = torch.autograd.grad(torch.stack(error(agent, reached, query)).mean(), reached)
    assert torch.allclose(plain[:size], expected.sum(0), rtol=1e-9, atol=1e-12)


def test_an_update_reports_the_errors_before_and_after_adapting_and_lowers_the_latter() -> None:
    learner = build(lr=2e-2)
    first = learner.update(demonstration_trials(), 0.0, 0)
    agent = build().agent
    agent.norm.update(
        demonstration_trials().episodes[0].obs[demonstration_trials().episodes[0].valid]
    )
    weights = agent.begin(TASKS)[0], adapted(agent, demonstration_trials().episodes[0])
    before, after = (
        float(torch.stack(error(agent, w, demonstration_trials().episodes[1])).mean())
        for w in weights
    )
    assert first["train/loss_before"] == pytest.approx(before, rel=1e-5)
    assert first["train/loss"] == pytest.approx(after, rel=1e-5)
    for i in range(30):
        last = learner.update(demonstration_trials(), 0.0, i)
    assert last["train/loss"] < 0.7 * first["train/loss"]
    assert finite(learner)


def test_cloning_behaviour_is_plain_regression_without_rates() -> None:
    learner, old = build(inner_steps=0, grad_norm=1e9), build(inner_steps=0)
    metrics = learner.update(demonstration_trials(), 0.0, 0)
    old.agent.norm.load_state_dict(learner.agent.norm.state_dict())
    start = nn.utils.parameters_to_vector(old.agent.actor.parameters())
    loss = torch.stack(
        error(old.agent, start.expand(TASKS, -1), demonstration_trials().episodes[1])
    ).mean()
    loss.backward()
    for p, q in zip(learner.agent.actor.parameters(), old.agent.actor.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
        assert not torch.equal(p, q)
    assert (
        metrics["train/loss"]
        == metrics["train/loss_before"]
        == pytest.approx(loss.item(), rel=1e-5)
    )
    assert learner.agent.rates.grad is None
    assert not learner.agent.rates.requires_grad
    assert torch.equal(learner.agent.rates, old.agent.rates)


def test_the_learning_rate_falls_to_its_end() -> None:
    learner = build(lr=1e-2, lr_end=0.1)
    for progress, rate in ((0.0, 1e-2), (0.5, 5.5e-3), (1.0, 1e-3)):
        learner.update(demonstration_trials(), progress, 0)
        assert [g["lr"] for g in learner.optimiser.param_groups] == [pytest.approx(rate)]


def test_the_outer_gradient_is_bounded() -> None:
    learners = [build(grad_norm=n) for n in (1e9, 1e-3)]
    norms = [one.update(demonstration_trials(), 0.0, 0)["train/grad_norm"] for one in learners]
    assert norms[0] == norms[1] > 0.1
    lengths = [
        nn.utils.get_total_norm([p.grad for p in one.agent.parameters()]) for one in learners
    ]
    assert [float(n) for n in lengths] == [
        pytest.approx(norms[0], rel=1e-4),
        pytest.approx(1e-3, rel=1e-2),
    ]


def test_a_gradient_that_is_no_number_is_not_followed() -> None:
    learner, old = build(), build().state()
    learner.update(both(lambda e: changed(e, action=fill((0, 0), 1e30))), 0.0, 0)
    assert same(learner.state(), old, "norm")
    assert finite(learner)


def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    learner, restored = build(), build(seed=1)
    learner.update(demonstration_trials(), 0.0, 0)
    state = learner.state()
    kept = {k: v.clone() for k, v in state.items()}
    restored.load(state)
    assert same(restored.state(), state)
    assert torch.equal(
        *(adapted(one.agent, demonstration_trials().episodes[0]) for one in (learner, restored))
    )
    for i in range(2):
        metrics = [one.update(demonstration_trials(), 0.3, i) for one in (learner, restored)]
        assert metrics[0] == metrics[1]
    assert same(learner.state(), restored.state())
    assert same(kept, state)
    assert not torch.equal(kept["agent.rates"], learner.state()["agent.rates"])


CODES, SPOTS = 3, torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
"""Classes of a toy task, and the places that they belong to."""
ORDERS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def toy(rng: torch.Generator, orders: Sequence[int], shots: int = 2, steps: int = 4) -> Trials:
    """What is seen is a class and noise, what is done is to point at its place, which is hidden and
    the task."""
    tasks, worlds = len(orders), len(orders) * CODES * shots
    variant = torch.arange(CODES).repeat_interleave(shots).repeat(tasks)
    place = SPOTS[ORDERS[torch.tensor(orders)].gather(1, variant.view(tasks, -1)).flatten()]
    episodes = []
    for _ in range(2):
        seen = nn.functional.one_hot(variant, CODES).float().expand(steps, -1, -1)
        obs = torch.cat(
            [
                seen + 0.1 * torch.randn(seen.shape, generator=rng),
                torch.randn(steps, worlds, 2, generator=rng),
            ],
            2,
        )
        episodes.append(
            demonstration_rollout(
                obs, place.expand(steps, -1, -1), torch.ones(steps, worlds, dtype=torch.bool)
            )
        )
    return Trials(episodes=tuple(episodes), task=torch.zeros(worlds, 1))


def test_a_toy_of_hidden_places_is_learned_from_demonstrations() -> None:
    shapes = Dimensions(obs=CODES + 2, act=2, task=1, episodes=2)
    settings = {
        "worlds": 8 * CODES * 2,
        "rollouts": CODES * 2,
        "width": 32,
        "inner_steps": 2,
        "lr": 5e-3,
        "guess": 0,
    }
    learner, rng = build(shapes=shapes, **settings, inner_lr=0.1), torch.Generator().manual_seed(0)
    rows = []
    for i in range(150):
        orders = torch.randint(len(ORDERS), (8,), generator=rng).tolist()
        rows.append(learner.update(toy(rng, orders), i / 150, i))
    before, after = (sum(r[f"train/{k}"] for r in rows[-20:]) / 20 for k in ("loss_before", "loss"))
    assert after < before / 2
    assert after < rows[0]["train/loss"] / 2
    trials = toy(rng, range(len(ORDERS)))
    agent = learner.agent
    (weights,) = agent.adapt(agent.begin(len(ORDERS)), trials.episodes[0])
    zeros = torch.zeros(trials.episodes[1].obs.shape[1])
    percept = Percept(trials.episodes[1].obs[0], zeros[:, None].expand(-1, 2), zeros, zeros, zeros)
    for context, share in ((weights, 0.9), (agent.begin(len(ORDERS))[0], 0.6)):
        pointed = torch.cdist(agent.act(percept, (context,))[0], SPOTS).argmin(1)
        right = pointed == torch.cdist(trials.episodes[1].action[0], SPOTS).argmin(1)
        assert (right.float().mean() > share) == (context is weights)


def test_demonstrations_that_are_no_whole_tasks_are_refused() -> None:
    with pytest.raises(MetarobotError, match="worlds = 10 is not a multiple of rollouts = 4"):
        build(worlds=10)


def test_more_cannot_be_guessed_than_is_seen() -> None:
    with pytest.raises(
        MetarobotError, match="guess must be at most 5, the number of observations, not 6"
    ):
        build(guess=6)
