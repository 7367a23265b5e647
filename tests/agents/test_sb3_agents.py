"""Stable-Baselines3's algorithms as agents: they act as SB3 does, and are trained,
saved and resumed as any other."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from helpers import run as command
from helpers import same

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import Protocol
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import Run, build_learner, open_run, publish_agent
from metarobot.training.train import start_run, train
from metarobot.types import Percept

pytest.importorskip("sb3_contrib")

from metarobot.agents.sb3.policies import TrialPolicy
from metarobot.agents.sb3.trial_envs import EpisodeVecEnv, TrialVecEnv

SMALL: dict[str, dict[str, Any]] = {
    "sb3:ppo": {"worlds": 4, "episodes": 1, "width": 8, "epochs": 2, "minibatches": 4},
    "sb3:recurrentppo": {"worlds": 4, "episodes": 2, "width": 8, "epochs": 1, "minibatches": 2},
    "sb3:sac": {
        "worlds": 4,
        "episodes": 1,
        "width": 8,
        "updates": 1,
        "batch": 16,
        "start": 600,
        "replay": 800,
    },
}
each = pytest.mark.parametrize("name", SMALL)
VEL = replace(families.get("CheetahVel100"), horizon=10)


def begin(out: Path, name: str, steps: int = 1200, **settings: Any) -> Run:
    config = agents.get(name).config(**SMALL[name] | settings)
    return start_run(
        TrainConfig(family="CheetahVel100", agent=name, steps=steps, threads=1, save_every=1),
        config,
        out,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    made = {
        name: begin(tmp_path_factory.mktemp("sb3") / name.replace(":", "-"), name) for name in SMALL
    }
    for run in made.values():
        assert train(run, show=False)
    return made


@each
def test_acts_as_sb3_predicts_through_a_whole_trial(trained: dict[str, Run], name: str) -> None:
    learner, agent = trained[name].learner(), trained[name].load_agent()
    learner.load(trained[name].checkpoint()[0])
    n, state, starts = 3, None, np.ones(3)
    env = Env(VEL, VEL.space.sample("test", n), threads=1)
    autoreset = AutoresetEnv(env)
    context, zeros = agent.begin(n), torch.zeros(n)
    percept = Percept(env.reset(0), torch.zeros(n, env.act_dim), zeros, zeros, zeros + 1)
    moved = 0.0
    for t in range(25):
        action, context = agent.act(percept, context)
        seen = percept.flat() if context else percept.obs
        expected, state = learner.model.predict(seen.numpy(), state, starts, deterministic=True)
        np.testing.assert_allclose(action.detach().numpy(), expected, atol=2e-7)
        moved += float(action.detach().abs().sum())
        step, starts = autoreset.step(action.detach()), np.zeros(n)
        done = (step.terminated | step.truncated).float()
        percept = Percept(step.obs, action.detach(), step.reward, done, zeros)
        assert bool(done.any()) == (t % 10 == 9)
    assert moved > 0.01


@each
def test_explores_as_sb3_does_when_it_collects(trained: dict[str, Run], name: str) -> None:
    agent = trained[name].load_agent()
    env = Env(VEL, VEL.space.sample("test", 2), threads=1)
    n, zeros = 2, torch.zeros(2)
    percept = Percept(env.reset(0), torch.zeros(n, env.act_dim), zeros, zeros, zeros + 1)
    noise = torch.randn(1000, n, env.act_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = torch.stack([agent.act(percept, agent.begin(n), x)[0] for x in noise])
        torch.manual_seed(0)
        seen = percept.flat() if agent.begin(n) else percept.obs
        theirs = np.stack(
            [agent.policy.predict(seen.numpy(), None, np.ones(n))[0] for _ in range(1000)]
        )
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.09)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=0.09)


def narrow() -> mujoco.MjSpec:
    """The cheetah, with motors that go from −0.2 to 0.6."""
    spec = VEL.spec()
    for motor in spec.actuators:
        motor.ctrlrange = [-0.2, 0.6]
    return spec


@each
def test_the_robots_own_bounds_are_kept(name: str) -> None:
    family = replace(VEL, horizon=4, spec=narrow)
    kind = agents.get(name)
    learner = build_learner(
        name, kind.config(**SMALL[name] | {"start": 1} if "sac" in name else SMALL[name]), family, 0
    )
    iterate = kind.fit(learner, family, 1)
    iterate(0, 0.0, 1)
    assert torch.allclose(learner.agent.reach, torch.tensor(0.4))
    assert torch.allclose(learner.agent.middle, torch.tensor(0.2))
    obs = 1e3 * torch.randn(4, len(family.observations), generator=torch.Generator().manual_seed(0))
    zeros, n = torch.zeros(4), len(learner.agent.reach)
    with torch.no_grad():
        percept = Percept(obs, torch.zeros(4, n), zeros, zeros, zeros + 1)
        action, _ = learner.agent.act(percept, learner.agent.begin(4), 50 * torch.ones(4, n))
    assert torch.allclose(action, torch.tensor(0.6))


@each
def test_goes_on_bit_for_bit_after_a_power_cut(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metarobot.training.train as module

    whole, broken = begin(tmp_path / "whole", name), begin(tmp_path / "broken", name)
    assert train(whole, show=False)
    real, calls = module.save_checkpoint, 0

    def cut(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("power cut")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(broken, show=False)
    assert train(open_run(broken.folder), show=False)
    (a, _), (b, _) = whole.checkpoint(), broken.checkpoint()
    assert same(a, b)
    rows = [read_metrics(r.folder / "metrics.jsonl") for r in (whole, broken)]
    returns = [[row["meta/post_adapt_return"] for row in r] for r in rows]
    assert returns[0] == returns[1]


@each
def test_training_leaves_the_global_generators_alone(tmp_path: Path, name: str) -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    train(begin(tmp_path / "x", name), show=False)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@each
def test_nothing_is_pickled_and_metrics_have_our_names(trained: dict[str, Run], name: str) -> None:
    folder = trained[name].folder
    kinds = {p.suffix for p in folder.iterdir() if "events" not in p.name}
    assert kinds == {".json", ".jsonl", ".safetensors"}
    row = read_metrics(folder / "metrics.jsonl")[-1]
    wanted = {
        "rollout/ep_rew_mean",
        "meta/post_adapt_return",
        "meta/return_episode_1",
        "time/fps",
        "time/collect_fps",
    }
    assert wanted <= set(row)
    assert ("meta/return_episode_2" in row) == (name == "sb3:recurrentppo")
    assert row["rollout/ep_len_mean"] == 100


@each
def test_is_evaluated_filmed_and_published_as_any_other(
    trained: dict[str, Run], name: str, tmp_path: Path
) -> None:
    run = trained[name]
    report = evaluate([run], Protocol(tasks=3, episodes=2, threads=1), controls=True)
    assert report["agent"] == name
    publish_agent(run, tmp_path / "box", {"summary": "x"})
    boxed = open_run(tmp_path / "box")
    assert not any(k.startswith("replay") for k in boxed.checkpoint()[0])
    again = evaluate([boxed], Protocol(tasks=3, episodes=2, threads=1))
    assert again["returns"] == report["returns"]


@each
def test_learning_moves_the_policy_and_its_normaliser(trained: dict[str, Run], name: str) -> None:
    fresh, learned = (
        trained[name].learner().agent.state_dict(),
        trained[name].load_agent().state_dict(),
    )
    weights = [
        k
        for k in fresh
        if k.endswith("weight") and ("pi" in k or "actor" in k or "policy_net" in k)
    ]
    assert weights
    assert all(not torch.equal(fresh[k], learned[k]) for k in weights)
    counts = [v for k, v in learned.items() if k.endswith("norm.count")]
    assert counts
    assert all(c >= 1200 for c in counts)


def test_memory_lives_through_the_trial_and_the_whole_sequence_equals_its_steps() -> None:
    family = replace(VEL, horizon=6)
    learner = build_learner(
        "sb3:recurrentppo",
        agents.get("sb3:recurrentppo").config(**SMALL["sb3:recurrentppo"]),
        family,
        0,
    )
    agent = learner.agent
    env = Env(family, family.space.sample("train", 4), threads=1)
    with torch.no_grad():
        trials = collect(agent, env, env.tasks, episodes=2, seed=0)
        (h, c) = agent.begin(4)
        percepts = []
        for k, episode in enumerate(trials.episodes):
            for t in range(6):
                last = trials.episodes[k - (t == 0)]
                begun = k + t == 0
                before = [
                    torch.zeros_like(x[0]) if begun else x[t - 1]
                    for x in (last.action, last.reward)
                ]
                first, done = (
                    torch.full((4,), float(begun)),
                    torch.full((4,), float(t == 0 and k > 0)),
                )
                percepts.append(Percept(episode.obs[t], *before, done, first).flat())
        sequence = torch.stack(percepts, 1).flatten(0, 1)
        starts = torch.zeros(4, 12)
        starts[:, 0] = 1.0
        policy: TrialPolicy = agent.policy
        distribution, _ = policy.get_distribution(sequence, (h[None], c[None]), starts.flatten())
        mean = distribution.distribution.mean.view(4, 12, -1).transpose(0, 1)
        acted = collect(agent, env, env.tasks, episodes=2, seed=0, explore=False)
    assert torch.allclose(acted.episodes[0].action[0], mean[0].clamp(-1, 1), atol=1e-6)
    noise = torch.randn(6, 4, env.act_dim, generator=torch.Generator().manual_seed(0))
    std = distribution.distribution.stddev[0]
    assert torch.allclose(
        trials.episodes[0].action, (mean[:6] + noise * std).clamp(-1, 1), atol=1e-5
    )


def test_walks_through_a_sequence_where_memories_are_cleared_within_it() -> None:
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    torch.manual_seed(0)
    lstm, features = torch.nn.LSTM(3, 5), torch.randn(2 * 7, 3)
    states, starts = (torch.randn(1, 2, 5), torch.randn(1, 2, 5)), torch.zeros(2, 7)
    for marks in ([(0, 0)], [(0, 0), (1, 0)], [(0, 0), (1, 4)], [], [(1, 3)]):
        starts.zero_()
        for mark in marks:
            starts[mark] = 1.0
        ours = TrialPolicy._process_sequence(features, states, starts.flatten(), lstm)
        theirs = RecurrentActorCriticPolicy._process_sequence(
            features, states, starts.flatten(), lstm
        )
        assert torch.allclose(ours[0], theirs[0], atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours[1], theirs[1], strict=True))


def test_a_trial_env_observes_the_percept_that_an_agent_gets_when_it_is_evaluated() -> None:
    family = replace(VEL, horizon=5)
    worlds = TrialVecEnv(family, 3, 2, 1)
    actions = torch.rand(10, 3, 6, generator=torch.Generator().manual_seed(0)).numpy() * 2 - 1
    worlds.seed(1)
    percepts, tasks, overs, infos = [worlds.reset()], [list(worlds.env.tasks)], [], []
    for action in actions:
        percept, _, over, info = worlds.step(action)
        percepts.append(percept)
        overs.append(over)
        infos.append(info)
        tasks.append(list(worlds.env.tasks))
    assert [bool(o.any()) for o in overs] == [False] * 9 + [True]
    assert all(t == tasks[0] for t in tasks[:10])
    assert tasks[10] != tasks[0]
    n = len(family.observations)
    for t, percept in enumerate(percepts[1:10]):
        np.testing.assert_array_equal(percept[:, n + 1 : n + 7], actions[t])
        np.testing.assert_allclose(percept[:, n], worlds.rewards[t])
        assert (percept[:, -2] == float(t == 4)).all()
        assert (percept[:, -1] == 0).all()
    for start_of_trial in (percepts[0], percepts[10]):
        assert (start_of_trial[:, n:-1] == 0).all()
        assert (start_of_trial[:, -1] == 1).all()
    assert "terminal_observation" not in infos[4][0]
    final = infos[9][0]["terminal_observation"]
    assert final.shape == percepts[0][0].shape
    np.testing.assert_allclose(final[n], worlds.rewards[9][0])
    assert infos[9][0]["TimeLimit.truncated"]
    assert [k for k, _ in worlds.finished_episodes] == [0] * 3 + [1] * 3


def test_single_episodes_have_a_new_task_each() -> None:
    worlds = EpisodeVecEnv(replace(VEL, horizon=5), 3, 1, 1)
    worlds.seed(1)
    worlds.reset()
    before = list(worlds.env.tasks)
    for _ in range(5):
        worlds.step(np.zeros((3, 6), np.float32))
    assert worlds.env.tasks != before


def test_rewards_are_scaled_in_training_only() -> None:
    learner = build_learner("sb3:ppo", agents.get("sb3:ppo").config(**SMALL["sb3:ppo"]), VEL, 0)
    worlds = learner.make_worlds(VEL, 1)
    learner.return_norm.update(torch.tensor([[0.0], [8.0]]))
    learner.before_iteration(worlds)
    worlds.reset()
    _, reward, _, _ = worlds.step(np.zeros((4, 6), np.float32))
    np.testing.assert_allclose(reward, worlds.rewards[0] / 4.0, rtol=1e-6)


BAD = {
    "unknown": (
        "train CheetahVel --agent sb3:foo --out {tmp}/x",
        "no agent called 'sb3:foo'; there are: ",
    ),
    "device": (
        "train CheetahVel --agent sb3:ppo --device cuda --out {tmp}/x",
        "'sb3:ppo' learns on the CPU",
    ),
    "init": (
        "train CheetahVel100 --agent sb3:ppo --init {run} --out {tmp}/x",
        "init needs a policy trained as ppo",
    ),
    "share": (
        "train CheetahVel --agent sb3:ppo --minibatches 7 --out {tmp}/x",
        "minibatches = 7 do not share the 25,600",
    ),
    "replay": (
        "train CheetahVel --agent sb3:sac --replay 4000000000 --out {tmp}/x",
        "a replay of 4,000,000,000 transitions needs 688.0 GB of memory",
    ),
    "zero": (
        "train CheetahVel --agent sb3:sac --updates 0 --out {tmp}/x",
        "updates must be at least 1, not 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(
    case: str, capsys: Any, trained: dict[str, Run], tmp_path: Path
) -> None:
    argv, message = BAD[case]
    code, _, err = command(
        capsys, *(w.format(tmp=tmp_path, run=trained["sb3:ppo"].folder) for w in argv.split())
    )
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()


def without(package: str, *argv: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{package!r}] = None; "
        "from metarobot.cli.main import main; main(sys.argv[1:])"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


def test_without_the_package_one_line_says_how_to_get_it_and_others_work(tmp_path: Path) -> None:
    done = without(
        "stable_baselines3",
        "train",
        "CheetahVel",
        "--agent",
        "sb3:ppo",
        "--out",
        str(tmp_path / "x"),
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: Stable-Baselines3 is not installed: pip install 'metarobot[sb3]'"
    )
    listed = without("sb3_contrib", "agents")
    assert listed.returncode == 0
    assert "sb3:ppo: sb3-contrib is not installed: pip install 'metarobot[sb3]'" in listed.stdout
    assert "rl2: " in listed.stdout


def test_weights_that_are_not_the_configured_ones_are_refused(
    trained: dict[str, Run], edit_json: Any
) -> None:
    run = trained["sb3:sac"]
    config = json.loads((run.folder / "config.json").read_text())
    edit_json(run.folder / "config.json", "agent_config", config["agent_config"] | {"width": 16})
    try:
        with pytest.raises(MetarobotError, match="holds other weights than"):
            open_run(run.folder).load_agent()
    finally:
        edit_json(run.folder / "config.json", "agent_config", config["agent_config"])
