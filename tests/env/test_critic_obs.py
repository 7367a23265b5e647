import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.envs import quadruped
from metarobot.envs.robots import go2
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import Family, WorldState, families, family_on
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import agent_dimensions, build_learner, open_run
from metarobot.training.train import start_run, train
from metarobot.types import Rollout, Trials, join_episodes

FLAT = replace(families.get("QuadrupedFlat"), horizon=10)
WORLDS = 6
TASKS = FLAT.space.sample("train", WORLDS, 0)
TINY: dict[str, Any] = {"worlds": WORLDS, "episodes": 2, "epochs": 2, "minibatches": 2, "width": 16}
LEARNERS = ("ppo", "oracle", "rl2")


def tipping(state: WorldState) -> Tensor:
    """Early ends by chance, the noise of the actions, at another step in each world and episode."""
    return state.action[:, 0] > 0.9


FALLING = FLAT.replace(terminate=tipping)


def learner(name: str, **settings: Any) -> Any:
    return build_learner(name, agents.get(name).config(**TINY | settings), FLAT, 0)


def live(agent: Any, family: Family = FALLING, **settings: Any) -> Trials:
    env = Env(family, TASKS, threads=1)
    return collect(agent, env, TASKS, episodes=2, seed=3, **settings)


@cache
def lived() -> Trials:
    """Two episodes of an untrained agent in each world, of which some end early."""
    trials = live(learner("rl2").agent)
    lengths = torch.stack([e.valid.sum(0) for e in trials.episodes])
    assert len(lengths.unique()) > 3, lengths
    last = trials.episodes[-1]
    assert last.truncated.any()
    assert last.terminated.any()
    return trials


def blank(family: Family) -> Family:
    """The same family, whose critic sees nothing."""
    return family.replace(critic_observe=None)


def again(episode: int) -> tuple[Env, Rollout]:
    """The environment at the start of an episode of what was lived, and what was lived."""
    env = Env(FALLING, TASKS, threads=1)
    env.reset(3)
    env.restart(episode)
    return env, lived().episodes[episode]


@pytest.mark.parametrize("episode", [0, 1])
def test_the_critic_sees_the_state_before_each_step_and_last_the_one_after_it(episode: int) -> None:
    env, rollout = again(episode)
    assert rollout.critic_obs.shape == (*rollout.valid.shape, 14)
    assert rollout.final_critic_obs.shape == (WORLDS, 14)
    last = torch.full((WORLDS, 14), torch.nan)
    for t in range(len(rollout.valid)):
        awake = rollout.valid[t]
        before = quadruped.critic_observe(env.state)
        assert torch.equal(rollout.critic_obs[t][awake], before[awake])
        step = env.step(rollout.action[t], awake)
        last[awake] = step.final_critic_obs[awake]
    assert torch.equal(rollout.final_critic_obs, last)
    assert len(last.unique(dim=0)) == WORLDS


def test_what_the_critic_sees_last_is_seen_before_any_reset() -> None:
    env = Env(FALLING, TASKS, threads=1)
    rng, ended = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        step = AutoresetEnv(env).step(2 * torch.rand(WORLDS, 12, generator=rng) - 1)
        over = step.terminated | step.truncated
        now = env.critic_obs()
        assert torch.equal(step.final_critic_obs[~over], now[~over])
        assert (step.final_critic_obs[over, 3:7] != now[over, 3:7]).all()
        assert (now[over, 7:11] == 0).all(), "nothing was sensed yet"
        ended += int(over.sum())
    assert ended > WORLDS


def joined(name: str, world: int) -> Tensor:
    """What one world lived, the padding left out, episode after episode."""
    return torch.cat([getattr(e, name)[e.valid[:, world], world] for e in lived().episodes])


def following(seen: str, final: str, world: int) -> Tensor:
    episodes = lived().episodes
    rows = [
        torch.cat([getattr(e, seen)[e.valid[:, world], world][1:], getattr(e, final)[world][None]])
        for e in episodes
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("world", range(WORLDS))
def test_a_sequence_keeps_what_the_critic_sees_beside_what_the_agent_sees(world: int) -> None:
    seq = join_episodes(lived().episodes)
    valid = seq.valid[:, world]
    length = int(valid.sum())
    assert valid[:length].all()
    assert torch.equal(seq.critic_obs[:length, world], joined("critic_obs", world))
    assert torch.equal(seq.percept.obs[:length, world], joined("obs", world))
    assert torch.equal(
        seq.next_critic_obs[:length, world], following("critic_obs", "final_critic_obs", world)
    )
    assert torch.equal(seq.next_obs[:length, world], following("obs", "final_obs", world))


def test_what_follows_is_what_comes_next_but_at_an_episodes_end() -> None:
    seq = join_episodes(lived().episodes)
    inside = (seq.valid & ~seq.terminated & ~seq.truncated)[:-1]
    assert torch.equal(seq.next_critic_obs[:-1][inside], seq.critic_obs[1:][inside])
    assert torch.equal(seq.next_obs[:-1][inside], seq.percept.obs[1:][inside])
    ends = (seq.valid & (seq.terminated | seq.truncated))[:-1] & seq.valid[1:]
    assert ends.sum() == WORLDS
    assert (seq.next_critic_obs[:-1][ends] != seq.critic_obs[1:][ends]).any(1).all()


@pytest.mark.parametrize("name", LEARNERS)
def test_actions_do_not_depend_on_what_the_critic_sees(name: str) -> None:
    agent = learner(name).agent
    seeing, blind = live(agent), live(agent, blank(FALLING))
    for a, b in zip(seeing.episodes, blind.episodes, strict=True):
        assert b.critic_obs.shape[-1] == b.final_critic_obs.shape[-1] == 0
        assert torch.equal(a.action, b.action)
        assert torch.equal(a.obs, b.obs)


def perturbed(trials: Trials, by: float) -> Trials:
    """The same trials, in which the critic saw something else."""
    noise = torch.Generator().manual_seed(0)

    def other(x: Tensor) -> Tensor:
        return x + by * torch.randn(x.shape, generator=noise)

    told = [
        replace(e, critic_obs=other(e.critic_obs), final_critic_obs=other(e.final_critic_obs))
        for e in trials.episodes
    ]
    return replace(trials, episodes=tuple(told))


def judged(name: str, trials: Trials) -> tuple[Tensor, Tensor, Tensor]:
    """Values, targets, and log-probabilities of the actions, as a learner sees them,
    ``(step,)``."""
    seq = join_episodes(trials.episodes)
    batch = learner(name)._targets(seq, trials.task)
    return batch.value[seq.valid], batch.target[seq.valid], batch.log_prob[seq.valid]


@pytest.mark.parametrize("name", LEARNERS)
def test_values_depend_on_what_the_critic_sees_and_the_policy_does_not(name: str) -> None:
    seq, ours, other = (
        join_episodes(lived().episodes),
        judged(name, lived()),
        judged(name, perturbed(lived(), 1.0)),
    )
    differ = [~torch.isclose(a, b, atol=1e-5) for a, b in zip(ours, other, strict=True)]
    fell = seq.terminated[seq.valid]
    assert differ[0].float().mean() > 0.95
    assert differ[1][~fell].float().mean() > 0.95
    assert not differ[1][fell].any(), "nothing follows a fall"
    assert torch.equal(ours[2], other[2])


@pytest.mark.parametrize("name", LEARNERS)
def test_the_last_value_depends_on_what_the_critic_sees_last(name: str) -> None:
    final = lived().episodes[-1]
    changed = replace(final, final_critic_obs=final.final_critic_obs + 1.0)
    ours, other = (
        judged(name, lived()),
        judged(name, replace(lived(), episodes=(*lived().episodes[:-1], changed))),
    )
    assert torch.equal(ours[0], other[0])
    assert not torch.equal(ours[1], other[1])


@pytest.mark.parametrize("family", [FALLING, blank(FALLING)], ids=["seeing", "blank"])
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_learn_from_early_ends_and_with_a_critic_that_sees_more_or_not(
    name: str, family: Family
) -> None:
    config = agents.get(name).config(**TINY)
    of = build_learner(name, config, family, 0)
    shapes = agent_dimensions(family, 2)
    assert shapes.critic == (14 if family.teaching.critic_observe else 0)
    before = {k: v.clone() for k, v in of.state().items()}
    for iteration in range(3):
        metrics = of.update(live(of.agent, family), iteration / 3, iteration)
        assert all(np.isfinite(v) for v in metrics.values())
    after = of.state()
    assert all(bool(v.isfinite().all()) for v in after.values())
    assert not torch.equal(after["agent.critic.0.weight"], before["agent.critic.0.weight"])
    if shapes.critic:
        count = after["critic_norm.count"]
        assert count == after["agent.norm.count"] > 0
        assert (after["critic_norm.mean"][:11] != 0).all()


def overturned(rng: np.random.Generator, model: Any) -> tuple[np.ndarray, np.ndarray]:
    qpos, qvel = quadruped.start(rng, model)
    qpos[3:7] = [0, 1, 0, 0]
    return qpos, qvel


def exploding(rng: np.random.Generator, model: Any) -> tuple[np.ndarray, np.ndarray]:
    qpos, qvel = quadruped.start(rng, model)
    return qpos, qvel * (1e9 if rng.uniform() < 0.5 else 1.0)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("begin", [overturned, exploding])
def test_falls_and_faults_at_the_first_step_are_lived_counted_and_learnt_from(
    name: str, begin
) -> None:
    of, family = learner(name), replace(FLAT, start=begin)
    trials = live(of.agent, family)
    lengths = torch.stack([e.valid.sum(0) for e in trials.episodes])
    faulted = torch.stack([e.faulted for e in trials.episodes])
    if begin is overturned:
        assert (lengths == 1).all()
        assert trials.faults() == 0
    else:
        assert 0 < trials.faults() < 2 * WORLDS
        assert (lengths[faulted] == 1).all()
        assert (trials.returns()[faulted] == 0).all()
    assert trials.steps() == lengths.sum()
    for e in trials.episodes:
        assert all(
            x.isfinite().all()
            for x in (e.obs, e.critic_obs, e.final_obs, e.final_critic_obs, e.reward)
        )
    assert all(np.isfinite(v) for v in of.update(trials, 0.0, 0).values())
    assert all(bool(v.isfinite().all()) for v in of.state().values())


@pytest.mark.parametrize("name", ["ppo", "rl2"])
def test_a_learner_restored_goes_on_with_the_same_bits(name: str) -> None:
    whole, other = learner(name), learner(name, std=0.3)
    whole.update(lived(), 0.0, 0)
    other.load(whole.state())
    for each in (whole, other):
        each.update(lived(), 0.5, 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state().values(), other.state().values(), strict=True)
    )


def digest(folder: Path) -> str:
    return str(json.loads((folder / "checkpoint.json").read_text())["sha256"])


@pytest.mark.parametrize("name", ["ppo", "rl2"])
def test_resuming_a_quadruped_gives_the_uninterrupted_bits(
    tmp_path: Path, name: str, monkeypatch
) -> None:
    import metarobot.training.train as module

    config = agents.get(name).config(**TINY)
    settings = TrainConfig(
        family="QuadrupedFlat", agent=name, steps=2 * WORLDS * 200 + 1, threads=1, save_every=1
    )
    whole, broken = (start_run(settings, config, tmp_path / n) for n in ("whole", "broken"))
    assert train(whole, show=False)
    calls, real = [], module.save_checkpoint

    def die_after_one(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("power cut")
        real(*args)

    monkeypatch.setattr(module, "save_checkpoint", die_after_one)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, show=False)
    monkeypatch.undo()
    assert digest(broken.folder) != digest(whole.folder)
    assert train(open_run(broken.folder), show=False)
    assert digest(broken.folder) == digest(whole.folder)
    rows = [read_metrics(r.folder / "metrics.jsonl") for r in (whole, broken)]
    assert [r["rollout/ep_rew_mean"] for r in rows[0]] == [
        r["rollout/ep_rew_mean"] for r in rows[1]
    ]
    assert len(rows[0]) >= 2


def test_a_run_of_a_quadruped_opens_and_acts_on_its_robot_and_on_another(tmp_path: Path) -> None:
    config = agents.get("rl2").config(**TINY)
    run = start_run(
        TrainConfig(family="QuadrupedFlat", agent="rl2", steps=1, threads=1),
        config,
        tmp_path / "run",
    )
    assert train(run, show=False)
    spec, path = go2.go2(), tmp_path / "robot.xml"
    for thing in (*spec.sensors, *spec.sites, spec.body("payload")):
        spec.delete(thing)
    path.write_text(spec.to_xml())
    runs = [open_run(run.folder), open_run(run.folder, str(path))]
    assert runs[1].family is not runs[0].family
    ours, theirs = (
        live(r.load_agent(), replace(r.family, horizon=10), explore=False).episodes[0] for r in runs
    )
    assert ours.action.isfinite().all()
    assert torch.allclose(ours.obs, theirs.obs, atol=1e-3), "a copy of the same robot"
    with pytest.raises(
        MetarobotError, match=r"^no robot model 'nowhere.xml': give a path to an MJCF file, or "
    ):
        live(runs[0].load_agent(), open_run(run.folder, "nowhere.xml").family)


def test_families_of_one_robot_have_no_other() -> None:
    with pytest.raises(
        MetarobotError, match=r"^CheetahVel has no other robot than its own; leave --robot out$"
    ):
        family_on("CheetahVel", "robot.xml")
