"""Learning from teacher_action: what a family knows of the right action, beside what is lived."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.envs import grasp
from metarobot.envs.robots.arm_control import STAT_GRIP_FORCE
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.ppo_core import distillation_loss
from metarobot.tasks.family import Family, families
from metarobot.training.collect import ExpertAgent, collect
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import build_learner
from metarobot.training.train import start_run, train
from metarobot.types import Trials, join_episodes

FAMILY = replace(families.get("GraspFragile"), horizon=60)
PLACEMENT = replace(families.get("Placement"), horizon=12)
LEARNERS = ["rl2", "rl2-oracle", "blind", "oracle"]
each_learner = pytest.mark.parametrize("name", LEARNERS)
WORLDS = 4
ASKED = 5
"""Of the action: the force."""


def learner(name: str, family: Family = FAMILY, **settings: Any) -> Any:
    usual = {"worlds": WORLDS, "minibatches": 2, "epochs": 1, "episodes": 2, "kl_stop": 1e9}
    return build_learner(name, agents.get(name).config(**usual | settings), family, 0)


@cache
def shown() -> Trials:
    """The expert in two short episodes, with the teacher_action it would have got."""
    tasks = FAMILY.space.sample("train", WORLDS, 0)
    env = Env(FAMILY, tasks, threads=1)
    return collect(ExpertAgent(env, 0.05), env, tasks, episodes=2, seed=0, record_teacher=True)


def test_advice_is_written_down_step_by_step_where_something_is_known() -> None:
    tasks, kept = PLACEMENT.space.sample("train", WORLDS, 0), []
    env = Env(PLACEMENT, tasks, threads=1)
    expert = ExpertAgent(env)
    episode = collect(expert, env, tasks, episodes=1, seed=0, record_teacher=True).episodes[0]
    assert torch.equal(
        episode.teacher_action, torch.stack(expert.asked)
    )  # without advice of its own, what the expert does
    for e in shown().episodes:
        known = ~e.teacher_action.isnan()
        assert known[..., ASKED].all()
        assert torch.equal(known[0], torch.tensor([False] * 5 + [True]).expand(WORLDS, -1))
        assert (known[..., :ASKED].all(-1) | ~known[..., :ASKED].any(-1)).all()
        kept.append(known[..., 0].float().mean())
    assert 0.2 < kept[0] < 0.9


def test_the_force_advised_holds_and_does_not_crush() -> None:
    env = Env(FAMILY, FAMILY.space.sample("train", 64, 1), threads=1)
    force = 0.5 * 120 ** ((env.teacher_action()[:, ASKED].double() + 1) / 2)
    assert (force > 1.2 * grasp.holding_force(env.snapshot)).all()
    assert (force < 0.9 * grasp.crushing_force(env.snapshot)).all()
    assert (env.snapshot.statistics[:, STAT_GRIP_FORCE] == 0).all()


def test_nobody_is_advised_who_does_not_ask() -> None:
    tasks = FAMILY.space.sample("train", WORLDS, 0)
    env = Env(FAMILY, tasks, threads=1)
    episode = collect(ExpertAgent(env, 0.05), env, tasks, episodes=1, seed=0).episodes[0]
    assert episode.teacher_action.shape == (*episode.valid.shape, 0)
    assert torch.equal(episode.obs, shown().episodes[0].obs)


def test_advice_stays_with_its_step_in_a_sequence() -> None:
    seq = join_episodes(shown().episodes)
    assert seq.teacher_action.shape == seq.action.shape
    for world in range(WORLDS):
        alone = torch.cat([e.teacher_action[:, world][e.valid[:, world]] for e in shown().episodes])
        assert torch.equal(
            seq.teacher_action[: len(alone), world].nan_to_num(9.0), alone.nan_to_num(9.0)
        )


def test_what_is_taught_is_the_squared_error_where_anything_is_known() -> None:
    mean = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]).requires_grad_()
    teacher_action = torch.tensor([[0.0, torch.nan, 1.0], [torch.nan] * 3])
    loss = distillation_loss(mean, teacher_action)
    assert loss.tolist() == pytest.approx([(1 + 4) / 3, 0])
    (slope,) = torch.autograd.grad(loss.sum(), mean)
    assert slope.isfinite().all()
    assert torch.equal(slope == 0, teacher_action.isnan())


@torch.no_grad()
def miss(one: Any) -> float:
    """Root mean squared error of the mean force."""
    seq, task = join_episodes(shown().episodes), shown().task
    agent = one.agent
    if hasattr(agent, "memory"):
        told = torch.zeros(*seq.valid.shape, one.critic_norm.mean.shape[0])
        x = agent.features(seq.percept, task if agent.privileged else None)
        mean = agent(x, task, told)[0]
    else:
        mean = agent.actor(agent.features(seq.percept.obs, task if agent.privileged else None))
    off: Tensor = (mean - seq.teacher_action)[..., ASKED][seq.valid]
    return float(off.square().mean().sqrt())


@each_learner
def test_who_is_taught_asks_for_the_right_force(name: str) -> None:
    alone, pupil = (learner(name, teach=w, lr=3e-3) for w in (0.0, 20.0))
    for i in range(12):
        for one in (alone, pupil):
            metrics = one.update(shown(), 0.0, i)
            assert all(torch.tensor(v).isfinite() for v in metrics.values())
    assert miss(pupil) < 0.5 * miss(alone)


@each_learner
def test_nothing_is_left_of_the_teacher_at_the_end(name: str) -> None:
    blank = replace(
        shown(),
        episodes=tuple(
            replace(e, teacher_action=e.teacher_action[..., :0]) for e in shown().episodes
        ),
    )
    alone, pupil = (learner(name, teach=w) for w in (0.0, 20.0))
    alone.update(blank, 1.0, 0)
    pupil.update(shown(), 1.0, 0)
    for a, b in zip(alone.state().values(), pupil.state().values(), strict=True):
        assert torch.equal(a, b)


def test_a_run_is_taught_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = agents.get("rl2").config(worlds=4, minibatches=2, epochs=1, teach=1.0, episodes=1)
    runs = [
        start_run(
            TrainConfig(family="GraspFragile", steps=s, threads=1, save_every=1),
            config,
            tmp_path / str(i),
        )
        for i, s in enumerate((600, 600))
    ]
    assert train(runs[0], show=False)
    assert train(runs[1], show=False)
    first, second = (r.checkpoint()[0] for r in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_family_without_expert_teaches_nobody(tmp_path: Path) -> None:
    with pytest.raises(
        MetarobotError,
        match=r"CheetahVel has no scripted expert; those that have one: .*GraspShapes",
    ):
        start_run(
            TrainConfig(family="CheetahVel"), agents.get("rl2").config(teach=1.0), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
