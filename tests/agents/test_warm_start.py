"""Initialising an agent from a policy without memory (--init)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_run

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import Run, build_learner, open_run
from metarobot.training.train import start_run, train

SMALL = {"worlds": 4, "minibatches": 2, "epochs": 1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(
        tmp_path_factory.mktemp("policy") / "run", agent="blind", family="CheetahDir"
    ).folder


def begun(out: Path, policy: Path, agent: str) -> Run:
    settings = TrainConfig(
        family="CheetahDir", agent=agent, init=str(policy), steps=1600, threads=1, save_every=1
    )
    return start_run(settings, replace(agents.get(agent).config(), **SMALL), out)


@pytest.mark.parametrize("name", ["rl2", "blind", "oracle"])
def test_a_warm_started_agent_acts_as_the_policy_does(name: str, policy: Path) -> None:
    source = open_run(policy).load_agent()
    with torch.no_grad():
        source.actor[-1].weight *= 50  # a tiny run's actions are too small to compare
    family = replace(families.get("CheetahDir"), horizon=15)
    learner = build_learner(name, agents.get(name).config(), family, 3)
    tasks = family.space.sample("test", 4)
    env = Env(family, tasks, threads=1)
    before_std = learner.agent.log_std.clone()
    before = collect(learner.agent, env, tasks, episodes=2, seed=0, explore=False)
    learner.warm_start(source)
    mine, theirs = (
        collect(a, env, tasks, episodes=2, seed=0, explore=False) for a in (learner.agent, source)
    )
    assert theirs.episodes[0].action.abs().mean() > 0.05
    for k in range(2):
        assert torch.allclose(mine.episodes[k].action, theirs.episodes[k].action, atol=1e-4)
    assert not torch.allclose(before.episodes[0].action, theirs.episodes[0].action, atol=1e-2)
    assert torch.equal(learner.agent.log_std, before_std)


@pytest.mark.parametrize("name", ["rl2", "oracle"])
def test_a_warm_started_run_trains_and_resumes_bit_for_bit(
    name: str, policy: Path, tmp_path: Path
) -> None:
    whole, parted = (begun(tmp_path / n, policy, name) for n in ("whole", "parted"))
    assert train(whole, show=False)
    assert train(parted, show=False)  # nothing saved yet: begins as the policy all the same
    first, second = (r.checkpoint()[0] for r in (whole, parted))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("agent", "family", "width", "message"),
    [
        ("maml", "CheetahDir", 64, "cannot begin as another policy"),
        ("rl2", "QuadrupedFlat", 128, "is observed otherwise"),
        ("rl2", "CheetahDir", 32, "does not fit"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_in_a_line(
    agent: str, family: str, width: int, message: str, policy: Path, tmp_path: Path
) -> None:
    config = replace(agents.get(agent).config(), width=width)
    with pytest.raises(MetarobotError, match=message) as refusal:
        start_run(
            TrainConfig(family=family, agent=agent, init=str(policy)), config, tmp_path / "run"
        )
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_only_from_a_policy_without_memory(tmp_path: Path) -> None:
    recurrent = tiny_run(tmp_path / "rl2", family="CheetahDir").folder
    with pytest.raises(MetarobotError, match="was trained as rl2"):
        begun(tmp_path / "run", recurrent, "rl2")
