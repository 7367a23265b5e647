from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    EMPTY,
    ROLLOUTS,
    SHAPES,
    TASKS,
    adapted,
    build,
    changed,
    collect_trials,
    each_with_critic,
    episode,
    example_trials,
    fill,
    same,
)
from torch import Tensor

from metarobot.learning.outer_critic import OuterCritic
from metarobot.types import Rollout


def make(seed: int = 0) -> OuterCritic:
    torch.manual_seed(seed)
    critic = OuterCritic(SHAPES, gamma=0.9, lam=0.8)
    critic.net.double()
    critic.return_norm.double()
    return critic


def last() -> Rollout:
    """An episode with falls, time limits and padding."""
    e = example_trials().episodes[-1]
    assert e.terminated.any()
    assert e.truncated.any()
    assert not e.valid.all()
    return e


def critic_arguments(e: Rollout) -> tuple[Tensor, Tensor, Tensor, Rollout, Tensor]:
    """What a critic takes of an episode, in float64."""
    exact = replace(e, reward=e.reward.double())
    return e.obs.double(), e.final_obs.double(), example_trials().task.double(), exact, e.valid


def learn(critic: OuterCritic, e: Rollout, seed: int) -> tuple[Tensor, ...]:
    x, _, task, _, valid = critic_arguments(e)
    advantage, target, explained = critic.advantage(*critic_arguments(e))
    critic.fit(x, task, target, valid, seed)
    return advantage[valid], target[valid], explained


def values(critic: OuterCritic, x: Tensor, task: Tensor) -> Tensor:
    """Values of one world's observations ``(step, obs)``."""
    with torch.no_grad():
        return critic.net(torch.cat([x, task.expand(len(x), -1)], 1))[:, 0]


def by_hand(critic: OuterCritic, e: Rollout, w: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One world's advantages and values, by their definition."""
    n, (x, final, task, *_) = int(e.valid[:, w].sum()), critic_arguments(e)
    v = values(critic, torch.cat([x[:n, w], final[w : w + 1]]), task[w])
    after = torch.where(e.terminated[:n, w], 0.0, v[1:])
    delta = scale * e.reward[:n, w].double() + critic.gamma * after - v[:n]
    decay = critic.gamma * critic.lam
    return torch.stack(
        [sum(decay ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
    ), v[:n]


def test_advantages_count_the_value_after_a_time_limit_and_none_after_a_fall() -> None:
    critic, e = make(), last()
    advantage, target, explained = critic.advantage(*critic_arguments(e))
    reward = e.reward.double()
    so_far = [
        sum(critic.gamma ** (t - s) * reward[s, w] for s in range(t + 1))
        for t, w in e.valid.nonzero().tolist()
    ]
    scale = 1.0 / torch.stack(so_far).std(correction=0)
    found = []
    for w, n in enumerate(e.valid.sum(0).tolist()):
        expected, value = by_hand(critic, e, w, scale)
        assert torch.allclose(advantage[:n, w], expected, rtol=1e-10, atol=1e-12)
        assert torch.allclose(target[:n, w], expected + value, rtol=1e-10, atol=1e-12)
        found.append(torch.stack([expected, expected + value]))
    error, wanted = torch.cat(found, 1)
    assert float(explained) == pytest.approx(float(1.0 - error.var() / wanted.var()))


def test_the_reward_scale_remembers_all_episodes() -> None:
    critic, e = make(), last()
    critic.advantage(*critic_arguments(e))
    alone = critic.return_norm.scale.clone()
    critic.advantage(*critic_arguments(changed(e, reward=lambda x: x.mul_(3.0))))
    assert critic.return_norm.count == 2 * e.valid.sum()
    assert alone / 3.0 < critic.return_norm.scale < alone


def test_padding_has_no_effect() -> None:
    critics, e, padding = [make(), make()], last(), ~last().valid
    garbage = changed(e, obs=fill(padding, 7.0), reward=fill(padding, 50.0))
    (first, *rest), (second, *others) = (
        learn(c, x, 0) for c, x in zip(critics, (e, garbage), strict=True)
    )
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
    assert same(*(c.state() for c in critics))


def test_fitting_lowers_the_error_and_can_tell_tasks_apart() -> None:
    x, _, task, _, valid = critic_arguments(last())
    direction = task[:, 0].expand(valid.shape)
    for obs, target in ((x, x[..., 1] + torch.sin(x[..., 8])), (torch.zeros_like(x), direction)):
        critic, errors = make(), []
        for _ in range(2):
            found = torch.stack([values(critic, obs[:, w], task[w]) for w in range(len(task))], 1)
            errors.append(float((found - target)[valid].square().mean()))
            critic.fit(obs, task, target, valid, 0)
        assert errors[1] < 0.1 * errors[0]


def test_a_restored_critic_goes_on_bit_for_bit() -> None:
    critic, restored = make(), make(seed=1)
    learn(critic, last(), 0)
    state = critic.state()
    kept = {k: v.clone() for k, v in state.items()}
    assert all(k.startswith("critic.") for k in state)
    restored.load(
        {"agent.net.0.weight": torch.zeros(1), "optimiser.0.step": torch.zeros(1)} | state
    )
    assert same(restored.state(), state)
    for one in (critic, restored):
        learn(one, last(), 1)
    assert same(critic.state(), restored.state())
    assert same(kept, state)
    assert not same(kept, critic.state(), "spread", "optimiser")


def test_fitting_is_a_function_of_weights_episode_and_seed() -> None:
    critics = [make() for _ in range(3)]
    for critic, seed, clutter in zip(critics, (0, 0, 1), (3, 4, 3), strict=True):
        torch.manual_seed(clutter)
        learn(critic, last(), seed)
    states = [c.state() for c in critics]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@each_with_critic
def test_the_critic_never_reaches_the_agent(name: str) -> None:
    learner, other = build(name), build(name)
    with torch.no_grad():
        for p in other.critic.net.parameters():
            p += 0.3 * torch.randn_like(p)
    agent, state = learner.agent, learner.state()
    assert {k.split(".")[0] for k in state} == {"agent", "critic"}
    assert {
        k.removeprefix("agent.") for k in state if k.startswith("agent.")
    } == agent.state_dict().keys()
    assert not any("critic" in k for k in agent.state_dict())
    assert {id(p) for p in agent.parameters()}.isdisjoint(
        id(p) for p in learner.critic.net.parameters()
    )
    for a, b in zip(
        *(collect_trials(one.agent, seed=2).episodes for one in (learner, other)), strict=True
    ):
        assert torch.equal(a.action, b.action)
    assert torch.equal(adapted(agent, episode()), adapted(other.agent, episode()))
    for one in (learner, other):
        one.update(example_trials(), 0.0, 0)
    assert not torch.equal(agent.meta_parameters(), other.agent.meta_parameters())


def test_advantages_are_computed_before_the_critic_is_fitted() -> None:
    learner, alone, e = build("maml"), build("maml").critic, last()
    agent, query = learner.agent, learner.agent.batches(example_trials())[-1]
    with_advantages, explained = agent.with_critic_advantages(
        query, example_trials(), learner.critic, 5
    )
    x = agent.norm(e.obs)
    advantage, target, expected = alone.advantage(
        x, agent.norm(e.final_obs), example_trials().task, e, e.valid
    )
    alone.fit(x, example_trials().task, target, e.valid, 5)
    assert torch.equal(explained, expected)
    assert same(learner.critic.state(), alone.state())
    for i in range(len(TASKS)):
        mine = range(ROLLOUTS * i, ROLLOUTS * (i + 1))
        valid, raw = (torch.cat([v[:, w] for w in mine]) for v in (e.valid, advantage))
        standard = (raw - raw[valid].mean()) / raw[valid].std(correction=0)
        assert torch.allclose(
            with_advantages.advantage[i], torch.where(valid, standard, 0.0), atol=1e-5
        )
    assert not torch.allclose(with_advantages.advantage, query.advantage, atol=0.1)
    assert all(
        a is b
        for a, b in zip(with_advantages._replace(advantage=query.advantage), query, strict=True)
    )


@each_with_critic
def test_the_task_is_used_by_the_critic_alone(name: str) -> None:
    swapped = replace(example_trials(), task=example_trials().task.flip(0))
    for blind in (False, True):
        learners = [build(name) for _ in range(2)]
        for one, trials in zip(learners, (example_trials(), swapped), strict=True):
            if blind:
                torch.nn.init.zeros_(one.critic.net[0].weight[:, SHAPES.obs :])
            one.update(trials, 0.0, 0)
        states = [
            {k: v for k, v in one.state().items() if k.startswith("agent.policy")}
            for one in learners
        ]
        assert same(*states) == blind


@pytest.mark.parametrize("name", ["maml", "promp"])
@pytest.mark.parametrize(
    "last",
    [*EMPTY.values(), {"valid": lambda x: x.fill_(False)[0, 0].fill_(True)}],
    ids=[*EMPTY, "one step"],
)
def test_a_query_with_nothing_to_compare_leaves_the_critic_as_it_was(
    name: str, last: dict[str, Any]
) -> None:
    learner = build(name)
    learner.update(example_trials(), 0.0, 0)
    before, (first, second) = learner.critic.state(), example_trials().episodes
    trials = replace(example_trials(), episodes=(first, changed(second, **last)))
    query = learner.agent.batches(trials)[-1]
    assert learner.agent.with_critic_advantages(query, trials, learner.critic, 1)[0] is query
    assert learner.update(trials, 0.0, 1)["train/explained_variance"] == 0.0
    assert same(before, learner.critic.state())
