from dataclasses import replace

import pytest
import torch

from metarobot.env.base import Env
from metarobot.learning.agent_interface import Context, Dimensions, agents
from metarobot.tasks.distributions import TaskError
from metarobot.tasks.family import Family, families
from metarobot.training.collect import collect
from metarobot.types import Percept, Rollout, Trials, join_episodes

EPISODES = 3


class Recorder:
    """A small agent whose context counts the steps it lived; it writes down all it is shown."""

    def __init__(self, privileged: bool = False) -> None:
        self.privileged = privileged
        self.told: list[torch.Tensor | None] = []
        self.percepts: list[Percept] = []
        self.contexts: list[torch.Tensor] = []
        self.adapted: list[tuple[torch.Tensor, Rollout]] = []

    def begin(self, worlds: int, task: torch.Tensor | None = None) -> Context:
        self.told.append(task)
        return (torch.zeros(worlds, 1),)

    def act(self, percept: Percept, context: Context, noise: torch.Tensor | None = None):
        self.percepts.append(Percept(*(x.clone() for x in percept)))
        self.contexts.append(context[0].clone())
        action = torch.sin(5 * percept.obs[:, :6]) + 0.05 * context[0] + 0.3 * percept.done[:, None]
        return (action if noise is None else action + noise), (context[0] + 1,)

    def adapt(self, context: Context, episode: Rollout) -> Context:
        self.adapted.append((context[0].clone(), episode))
        return context


def short(horizon: int = 12, name: str = "CheetahTerrain") -> Family:
    return replace(families.get(name), horizon=horizon)


def falling(horizon: int = 20) -> Family:
    """A family whose episodes end early, each world's at another step."""
    return short(horizon).replace(terminate=lambda state: state.qvel[:, 0].abs() > 0.8)


def tasks(family: Family, n: int = 5, seed: int = 0):
    return family.space.sample("train", n, seed)


def record(family: Family, seed: int = 1, n: int = 5) -> tuple[Recorder, Trials]:
    agent, given = Recorder(), tasks(family, n)
    return agent, collect(agent, Env(family, given, threads=1), given, episodes=EPISODES, seed=seed)


def rl2(family: Family, seed: int = 0):
    torch.manual_seed(seed)
    kind = agents.get("rl2")
    config = kind.config(width=16)
    shapes = Dimensions(
        obs=len(family.observations), act=6, task=len(family.space.params), episodes=EPISODES
    )
    agent = kind.build(config, shapes).agent
    with torch.no_grad():
        for p in agent.parameters():
            p += 0.2 * torch.randn_like(p)
    return agent


def lived(episode: Rollout, world: int) -> dict[str, torch.Tensor]:
    """What one world lived through in one episode, without the padding."""
    rows = episode.valid[:, world]
    parts = {
        k: getattr(episode, k)[rows, world]
        for k in ("obs", "action", "reward", "terminated", "truncated")
    }
    whole = {k: getattr(episode, k)[world] for k in ("final_obs", "faulted")}
    return parts | whole | {k: v[world] for k, v in episode.terms.items()}


def same(a: Trials, b: Trials, worlds=None) -> bool:
    """Whether two sets of trials are equal bit for bit in those worlds."""
    for x, y in zip(a.episodes, b.episodes, strict=True):
        for w in range(x.valid.shape[1]) if worlds is None else worlds:
            one, two = lived(x, w), lived(y, w)
            assert one.keys() == two.keys()
            if not all(torch.equal(one[k], two[k]) for k in one):
                return False
    return True


@pytest.mark.parametrize("family", [short(), falling()], ids=["short", "falling"])
def test_the_same_weights_tasks_and_seed_give_the_same_bits(family: Family) -> None:
    agent, given = rl2(family), tasks(family)
    env = Env(family, given, threads=1)
    first = collect(agent, env, given, episodes=EPISODES, seed=7)
    assert same(first, collect(agent, env, given, episodes=EPISODES, seed=7))

    collect(agent, env, tasks(family, seed=3), episodes=1, seed=9)
    for _ in range(5):
        env.step(torch.randn(5, 6))
    assert same(first, collect(agent, env, given, episodes=EPISODES, seed=7))

    torch.manual_seed(99)
    fresh = Env(family, tasks(family, seed=4), seed=5, threads=2)
    assert same(first, collect(agent, fresh, given, episodes=EPISODES, seed=7))

    assert not same(first, collect(agent, env, given, episodes=EPISODES, seed=8))
    assert not same(first, collect(rl2(family, 1), env, given, episodes=EPISODES, seed=7))


def test_collecting_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    record(short())
    assert torch.equal(before, torch.get_rng_state())


def test_without_exploration_the_seed_only_decides_the_start() -> None:
    family, agent = short(), Recorder()
    given = tasks(family)
    trials = collect(agent, Env(family, given, threads=1), given, episodes=1, seed=1, explore=False)
    (episode,) = trials.episodes
    counted = torch.arange(12.0)[:, None, None]
    assert torch.allclose(
        episode.action, torch.sin(5 * episode.obs[..., :6]) + 0.05 * counted, atol=1e-6
    )


def test_valid_marks_the_steps_up_to_the_first_end() -> None:
    _, trials = record(falling())
    lengths = torch.stack([e.valid.sum(0) for e in trials.episodes])
    assert len(lengths.unique()) > 3
    for e in trials.episodes:
        ended = e.terminated | e.truncated
        assert len(e.valid) == e.valid.sum(0).max()
        for w in range(5):
            n = int(e.valid[:, w].sum())
            assert e.valid[:n, w].all()
            assert torch.nonzero(ended[:, w])[:, 0].tolist() == [n - 1]
            assert (e.reward[n:, w] == 0).all()
        assert (e.final_obs[e.terminated.any(0), 8].abs() > 0.8).all()
        assert (e.valid.sum(0)[e.truncated.any(0)] == 20).all()
    assert trials.steps() == lengths.sum()
    assert trials.faults() == 0


def test_returns_count_lived_steps_and_equal_the_weighted_terms() -> None:
    family = falling()
    _, trials = record(family)
    for k, e in enumerate(trials.episodes):
        for w in range(5):
            assert trials.returns()[k, w] == pytest.approx(
                float(lived(e, w)["reward"].double().sum()), abs=1e-5
            )
        total = sum(weight * e.terms[name] for name, weight in family.weights.items())
        assert torch.allclose(total, trials.returns()[k], atol=1e-4)


def test_the_context_of_a_world_that_waits_is_left_alone() -> None:
    agent, trials = record(falling())
    lengths = torch.stack([e.valid.sum(0) for e in trials.episodes]).cumsum(0)
    assert len(agent.adapted) == EPISODES - 1
    for k, (context, episode) in enumerate(agent.adapted):
        assert context[:, 0].tolist() == lengths[k].tolist()
        assert episode is trials.episodes[k]


def percepts_of(agent: Recorder, trials: Trials, world: int) -> list[Percept]:
    """All that one world's agent was shown while its episodes lasted, in order."""
    out, start = [], 0
    for e in trials.episodes:
        for t in range(len(e.valid)):
            if e.valid[t, world]:
                out.append(Percept(*(x[world] for x in agent.percepts[start + t])))
        start += len(e.valid)
    assert start == len(agent.percepts)
    return out


@pytest.mark.parametrize("family", [short(), falling()], ids=["short", "falling"])
def test_the_sequence_shows_the_learner_what_the_agent_was_shown(family: Family) -> None:
    agent, trials = record(family)
    seq = join_episodes(trials.episodes)
    for w in range(5):
        seen = percepts_of(agent, trials, w)
        assert seq.valid[:, w].tolist() == [True] * len(seen) + [False] * (
            len(seq.valid) - len(seen)
        )
        for t, percept in enumerate(seen):
            for name, x in percept._asdict().items():
                assert torch.equal(getattr(seq.percept, name)[t, w], x), (t, w, name)


@pytest.mark.parametrize("family", [short(), falling()], ids=["short", "falling"])
def test_the_sequence_equals_a_slow_reconstruction(family: Family) -> None:
    _, trials = record(family)
    seq = join_episodes(trials.episodes)
    for w in range(5):
        action, reward, done, j = torch.zeros(6), torch.tensor(0.0), 0.0, 0
        for e in trials.episodes:
            parts = lived(e, w)
            for t in range(len(parts["obs"])):
                last = t == len(parts["obs"]) - 1
                assert torch.equal(seq.percept.obs[j, w], parts["obs"][t])
                assert torch.equal(seq.percept.action[j, w], action)
                assert seq.percept.reward[j, w] == reward
                assert seq.percept.done[j, w] == done
                assert seq.percept.first[j, w] == (j == 0)
                action, reward, done = parts["action"][t], parts["reward"][t], float(last)
                assert torch.equal(seq.action[j, w], action)
                assert seq.reward[j, w] == reward
                assert seq.terminated[j, w] == parts["terminated"][t]
                assert seq.truncated[j, w] == parts["truncated"][t]
                assert torch.equal(
                    seq.next_obs[j, w], parts["final_obs"] if last else parts["obs"][t + 1]
                )
                j += 1
        assert not seq.valid[j:, w].any()


def test_an_episode_begins_where_the_reset_put_the_world() -> None:
    _, trials = record(falling())
    for before, after in zip(trials.episodes, trials.episodes[1:], strict=False):
        assert (after.obs[0] != before.final_obs).any(1).all()
        assert (after.obs[0] != before.obs[0]).any(1).all()
        assert (after.obs[0, :, 8].abs() < 0.5).all()


@pytest.mark.parametrize("family", [short(), falling()], ids=["short", "falling"])
def test_another_worlds_task_changes_nothing_in_this_world(family: Family) -> None:
    agent, given = rl2(family), tasks(family)
    env = Env(family, given, threads=1)
    other = [given[0], tasks(family, 1, seed=8)[0], *given[2:]]
    a, b = (collect(agent, env, t, episodes=EPISODES, seed=2) for t in (given, other))
    assert same(a, b, [0, 2, 3, 4])
    assert not same(a, b, [1])


def test_how_long_others_live_changes_nothing_in_this_world() -> None:
    def end_others_after(x: float) -> Family:
        return short(25).replace(
            terminate=lambda s: s.qvel[:, 0].abs() > torch.tensor([0.5, x, x, x, x])
        )

    trials = [
        collect(Recorder(), Env(f, tasks(f), threads=1), tasks(f), episodes=EPISODES, seed=2)
        for f in (end_others_after(0.3), end_others_after(99.0))
    ]
    assert [e.valid.shape[0] for e in trials[0].episodes] != [
        e.valid.shape[0] for e in trials[1].episodes
    ]
    assert same(*trials, [0])


def test_only_privileged_agents_are_told_the_task() -> None:
    family = short()
    given = tasks(family)
    env = Env(family, given, threads=1)
    plain, oracle = Recorder(), Recorder(privileged=True)
    for agent in (plain, oracle):
        trials = collect(agent, env, given, episodes=2, seed=0)
        assert torch.equal(trials.task, family.space.encode(given))
    assert plain.told == [None]
    assert len(oracle.told) == 1
    assert torch.equal(oracle.told[0], family.space.encode(given))


@pytest.mark.parametrize("name", agents.names())
def test_only_the_oracle_of_our_agents_is_privileged(name: str) -> None:
    kind = agents.get(name)
    agent = kind.build(kind.config(), Dimensions(obs=17, act=6, task=1, episodes=2)).agent
    assert agent.privileged == (name.endswith("oracle"))


def test_the_memory_survives_the_end_of_an_episode() -> None:
    family = short()
    agent, given = rl2(family), tasks(family)
    env = Env(family, given, threads=1)
    kept, contexts = [], []

    def forget(context: Context) -> Context:
        return tuple(torch.zeros_like(x) for x in context)

    def look(context: Context) -> Context:
        contexts.append(context)
        return context

    for between in (look, forget):
        kept.append(collect(agent, env, given, episodes=2, seed=0, between=between).episodes)
    assert all((x != 0).any() for context in contexts for x in context)
    assert torch.equal(kept[0][0].action, kept[1][0].action)
    assert not torch.equal(kept[0][1].action[0], kept[1][1].action[0])


def test_the_memory_is_cleared_between_trials() -> None:
    family = short()
    agent, given = rl2(family), tasks(family)
    env = Env(family, given, threads=1)
    first = collect(agent, env, given, episodes=1, seed=0)
    assert torch.equal(
        first.episodes[0].action, collect(agent, env, given, episodes=1, seed=0).episodes[0].action
    )
    recorder = Recorder()
    for _ in range(2):
        collect(recorder, env, given, episodes=1, seed=0)
    assert [c[0, 0].item() for c in recorder.contexts] == 2 * list(range(12))


class Breaks(Recorder):
    """Sends a NaN to one motor of one world at its fourth step."""

    def act(self, percept: Percept, context: Context, noise: torch.Tensor | None = None):
        action, after = super().act(percept, context, noise)
        if len(self.percepts) == 4:
            action[1, 0] = float("nan")
        return action, after


def test_broken_physics_ends_one_worlds_episode_only() -> None:
    family = short()
    given = tasks(family)
    env = Env(family, given, threads=1)
    sound, broken = (collect(a, env, given, episodes=2, seed=0) for a in (Recorder(), Breaks()))
    assert same(sound, broken, [0, 2, 3, 4])
    assert broken.faults() == 1
    first, second = broken.episodes
    assert first.faulted.tolist() == [False, True, False, False, False]
    assert first.valid[:, 1].tolist() == [True] * 4 + [False] * 8
    assert first.terminated[3, 1]
    assert second.valid.all()
    assert all(e.reward.isfinite().all() and e.final_obs.isfinite().all() for e in broken.episodes)
    assert torch.equal(sound.episodes[1].obs[0], second.obs[0])


def test_every_step_can_be_watched() -> None:
    family, seen = short(), []
    given = tasks(family)
    env = Env(family, given, threads=1)
    trials = collect(
        Recorder(),
        env,
        given,
        episodes=2,
        seed=0,
        watch=lambda k, env, step: seen.append((k, step.reward.clone())),
    )
    assert [k for k, _ in seen] == [0] * 12 + [1] * 12
    assert torch.equal(
        torch.stack([r for _, r in seen]), torch.cat([e.reward for e in trials.episodes])
    )


def test_a_task_of_another_family_is_refused() -> None:
    family = short()
    env = Env(family, tasks(family), threads=1)
    with pytest.raises(TaskError, match="that is a task of CheetahVel, not of CheetahTerrain"):
        collect(Recorder(), env, tasks(short(name="CheetahVel")), episodes=1, seed=0)
