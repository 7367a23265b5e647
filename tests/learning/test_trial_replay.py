from dataclasses import replace

import pytest
import torch
from helpers import FALLING, TASKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Dimensions
from metarobot.learning.trial_replay import TrialReplay
from metarobot.threads_and_memory import available_memory
from metarobot.training.collect import collect
from metarobot.types import Rollout, Trials, join_episodes

HORIZON, EPISODES = 5, 3
SHAPES = Dimensions(obs=3, act=2, task=1, episodes=EPISODES, horizon=HORIZON)
TRIAL = HORIZON * EPISODES


def written(lengths: list[list[int]], first: int = 0) -> Trials:
    """Trials whose observations say where they were made, (trial, episode, time); lengths
    ``(episode, trial)``."""
    worlds = len(lengths[0])
    episodes = tuple(_episode(torch.tensor(n), k, first) for k, n in enumerate(lengths))
    return Trials(episodes=episodes, task=torch.arange(float(first), first + worlds)[:, None])


def _episode(length: Tensor, k: int, first: int) -> Rollout:
    time, worlds = int(length.max()), len(length)
    t = torch.arange(time, dtype=torch.float32)[:, None].expand(time, worlds)
    world = torch.arange(float(first), first + worlds)
    obs = torch.stack([world.expand_as(t), torch.full_like(t, k), t], -1)
    valid, last = t < length, t == length - 1
    final = torch.stack([world, torch.full_like(world, k), length.float()], -1)
    failed = last & (length < HORIZON)
    return Rollout(
        obs=obs,
        action=obs[..., :2] + 0.5,
        reward=obs[..., 2] - 10.0 * k,
        terminated=failed,
        truncated=last & ~failed,
        valid=valid,
        final_obs=final,
        critic_obs=t[..., None][..., :0],
        final_critic_obs=final[:, :0],
        faulted=torch.zeros(worlds, dtype=torch.bool),
        teacher_action=obs[..., :0],
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(trials: int, capacity: int = 6) -> TrialReplay:
    replay = TrialReplay(SHAPES, capacity * TRIAL)
    for i in range(trials):
        replay.add(written([[5], [2], [5]], first=i))
    return replay


episode_lengths = st.integers(1, 4).flatmap(
    lambda worlds: st.lists(
        st.lists(st.integers(1, HORIZON), min_size=worlds, max_size=worlds), min_size=3, max_size=3
    )
)


@settings(max_examples=60, deadline=None)
@given(lengths=episode_lengths, episodes=st.integers(1, EPISODES))
def test_samples_were_collected_and_everything_collected_is_sampled(
    lengths: list[list[int]], episodes: int
) -> None:
    replay, worlds = TrialReplay(SHAPES, 4 * TRIAL), len(lengths[0])
    replay.add(written(lengths))
    steps = replay.transitions_at(
        replay.sample_transitions(torch.arange(worlds), 400, episodes, generator())
    )
    trial, k, t = steps.obs.unbind(-1)
    assert torch.equal(steps.next_obs, torch.stack([trial, k, t + 1], -1))
    assert torch.equal(steps.action, steps.obs[..., :2] + 0.5)
    assert torch.equal(steps.reward, t - 10.0 * k)
    length = torch.tensor(lengths)[k.long(), trial.long()]
    assert torch.equal(steps.terminated, ((t == length - 1) & (length < HORIZON)).float())
    for world in range(worlds):
        seen = {(int(a), int(b)) for a, b in zip(k[world], t[world], strict=True)}
        assert seen == {(e, i) for e in range(episodes) for i in range(lengths[e][world])}
        assert torch.equal(trial[world], torch.full((400,), float(world)))


def test_transitions_of_real_trials_are_those_of_their_sequence() -> None:
    class Random:
        privileged = explores = False

        def begin(self, worlds: int, task: Tensor | None = None) -> tuple[Tensor, ...]:
            return ()

        def act(self, percept, context, noise=None):
            return noise, context

        def adapt(self, context, episode):
            return context

    trials = collect(Random(), Env(FALLING, TASKS, threads=1), TASKS, episodes=2, seed=0)
    assert not all(e.valid.all() for e in trials.episodes)
    replay = TrialReplay(
        Dimensions(obs=17, act=6, task=1, episodes=2, horizon=FALLING.horizon), 10_000
    )
    replay.add(trials)
    steps, seq = (
        replay.transitions_at(replay.sample_transitions(torch.arange(2), 500, 2, generator())),
        join_episodes(trials.episodes),
    )
    assert seq.truncated.any() or seq.terminated.any()
    for world in range(2):
        valid = seq.valid[:, world]
        names = (
            seq.percept.obs,
            seq.action,
            seq.reward[..., None],
            seq.terminated[..., None].float(),
            seq.next_obs,
        )
        truth = torch.cat([x[:, world][valid] for x in names], -1)
        found = torch.cat([x[world] if x.dim() > 2 else x[world][:, None] for x in steps], -1)
        assert torch.equal(found.unique(dim=0), truth.unique(dim=0))
    assert torch.equal(replay.task(torch.arange(2)), trials.task)


def test_a_time_limit_is_no_failure_and_leads_to_the_observation_before_the_reset() -> None:
    replay = filled(1)
    steps = replay.transitions_at(replay.sample_transitions(torch.tensor([0]), 300, 1, generator()))
    last = steps.obs[..., 2] == HORIZON - 1
    assert last.any()
    assert not steps.terminated.any()
    assert torch.equal(steps.next_obs[last][:, 2], torch.full((int(last.sum()),), float(HORIZON)))


def test_the_oldest_trials_are_written_over() -> None:
    replay = filled(8)
    assert len(replay) == 6
    assert replay.transition_count == 6 * 12
    assert sorted(replay.task(torch.arange(6))[:, 0].tolist()) == [2, 3, 4, 5, 6, 7]


def test_every_second_task_is_a_recent_one() -> None:
    replay = filled(8)
    tasks = torch.stack(
        [replay.task(replay.sample_trials(8, 2, generator(i)))[:, 0] for i in range(200)]
    )
    assert set(tasks[:, ::2].flatten().tolist()) == {6, 7}
    assert set(tasks[:, 1::2].flatten().tolist()) == {2, 3, 4, 5, 6, 7}
    assert set(filled(1).sample_trials(8, 2, generator()).tolist()) == {0}


def test_sampling_is_a_function_of_the_generator_alone() -> None:
    a, b = filled(8), filled(8)
    torch.manual_seed(1)
    rows = a.sample_trials(4, 3, generator(5))
    torch.manual_seed(2)
    assert torch.equal(rows, b.sample_trials(4, 3, generator(5)))
    assert torch.equal(
        a.sample_transitions(rows, 9, 2, generator(6)),
        b.sample_transitions(rows, 9, 2, generator(6)),
    )


@pytest.mark.parametrize("trials", [0, 3, 8])
def test_a_restored_replay_is_the_same_and_only_what_is_stored_is_saved(trials: int) -> None:
    replay, other = filled(trials), filled(0)
    state = replay.state()
    assert len(state["data"]) == min(trials, 6)
    other.load(state)
    assert all(torch.equal(v, other.state()[k]) for k, v in state.items())
    for r in (replay, other):
        r.add(written([[5], [2], [5]], first=99))
    assert all(torch.equal(v, other.state()[k]) for k, v in replay.state().items())


def test_a_state_is_no_view_of_what_is_stored() -> None:
    replay = filled(6)
    state = replay.state()
    before = {k: v.clone() for k, v in state.items()}
    replay.add(written([[5], [2], [5]], first=99))
    assert all(torch.equal(v, before[k]) for k, v in state.items())


def test_a_replay_larger_than_memory_is_refused_with_the_number() -> None:
    with pytest.raises(
        MetarobotError, match=r"a replay of 1,000,000,000,000 transitions needs .* GB .* are free"
    ):
        TrialReplay(SHAPES, 10**12)
    assert 0 < available_memory() < 10**14


@pytest.mark.parametrize(("transitions", "at_once"), [(1, 1), (TRIAL - 1, 1), (3 * TRIAL - 1, 3)])
def test_a_replay_smaller_than_an_iteration_is_refused(transitions: int, at_once: int) -> None:
    with pytest.raises(
        MetarobotError,
        match=f"does not hold the {at_once} trials of an iteration, 3 x 5 transitions",
    ):
        TrialReplay(SHAPES, transitions, at_once)


def test_a_broken_number_in_the_padding_stays_outside() -> None:
    trials = written([[5, 2], [2, 5], [5, 5]])
    first = trials.episodes[0]
    reward = torch.where(first.valid, first.reward, float("nan"))
    replay = TrialReplay(SHAPES, 4 * TRIAL)
    replay.add(replace(trials, episodes=(replace(first, reward=reward), *trials.episodes[1:])))
    steps = replay.transitions_at(replay.sample_transitions(torch.arange(2), 300, 3, generator()))
    assert all(bool(x.isfinite().all()) for x in steps)
