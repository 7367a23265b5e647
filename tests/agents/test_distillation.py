"""Distillation: learning from the teacher's actions beside the collected trials."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metarobot.agents.rl2 import RL2Agent
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
def expert_trials() -> Trials:
    """The expert in two short episodes, with the teacher's actions recorded."""
    tasks = FAMILY.space.sample("train", WORLDS, 0)
    env = Env(FAMILY, tasks, threads=1)
    return collect(ExpertAgent(env, 0.05), env, tasks, episodes=2, seed=0, record_teacher=True)


def test_teacher_actions_are_recorded_at_every_step_where_they_are_known() -> None:
    tasks, kept = PLACEMENT.space.sample("train", WORLDS, 0), []
    env = Env(PLACEMENT, tasks, threads=1)
    expert = ExpertAgent(env)
    episode = collect(expert, env, tasks, episodes=1, seed=0, record_teacher=True).episodes[0]
    assert torch.equal(
        episode.teacher_action, torch.stack(expert.asked)
    )  # a family without advice is taught by its expert
    for e in expert_trials().episodes:
        known = ~e.teacher_action.isnan()
        assert known[..., ASKED].all()
        assert torch.equal(known[0], torch.tensor([False] * 5 + [True]).expand(WORLDS, -1))
        assert (known[..., :ASKED].all(-1) | ~known[..., :ASKED].any(-1)).all()
        kept.append(known[..., 0].float().mean())
    assert 0.2 < kept[0] < 0.9


def test_the_teachers_force_holds_and_does_not_crush() -> None:
    env = Env(FAMILY, FAMILY.space.sample("train", 64, 1), threads=1)
    force = 0.5 * 120 ** ((env.teacher_action()[:, ASKED].double() + 1) / 2)
    assert (force > 1.2 * grasp.holding_force(env.snapshot)).all()
    assert (force < 0.9 * grasp.crushing_force(env.snapshot)).all()
    assert (env.snapshot.statistics[:, STAT_GRIP_FORCE] == 0).all()


def test_teacher_actions_are_recorded_only_on_request() -> None:
    tasks = FAMILY.space.sample("train", WORLDS, 0)
    env = Env(FAMILY, tasks, threads=1)
    episode = collect(ExpertAgent(env, 0.05), env, tasks, episodes=1, seed=0).episodes[0]
    assert episode.teacher_action.shape == (*episode.valid.shape, 0)
    assert torch.equal(episode.obs, expert_trials().episodes[0].obs)


def test_a_teacher_action_stays_with_its_step_in_a_sequence() -> None:
    seq = join_episodes(expert_trials().episodes)
    assert seq.teacher_action.shape == seq.action.shape
    for world in range(WORLDS):
        alone = torch.cat(
            [e.teacher_action[:, world][e.valid[:, world]] for e in expert_trials().episodes]
        )
        assert torch.equal(
            seq.teacher_action[: len(alone), world].nan_to_num(9.0), alone.nan_to_num(9.0)
        )


def test_the_distillation_loss_is_the_squared_error_where_the_teacher_is_known() -> None:
    mean = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]).requires_grad_()
    teacher_action = torch.tensor([[0.0, torch.nan, 1.0], [torch.nan] * 3])
    loss = distillation_loss(mean, teacher_action)
    assert loss.tolist() == pytest.approx([(1 + 4) / 3, 0])
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    assert gradient.isfinite().all()
    assert torch.equal(gradient == 0, teacher_action.isnan())


@torch.no_grad()
def force_error(one: Any) -> float:
    """Root mean squared error of the mean force."""
    seq, task = join_episodes(expert_trials().episodes), expert_trials().task
    agent = one.agent
    if isinstance(agent, RL2Agent):
        critic_obs = torch.zeros(*seq.valid.shape, one.critic_norm.mean.shape[0])
        x = agent.features(seq.percept, task if agent.privileged else None)
        mean = agent(x, task, critic_obs)[0]
    else:
        mean = agent.actor(agent.features(seq.percept.obs, task if agent.privileged else None))
    off: Tensor = (mean - seq.teacher_action)[..., ASKED][seq.valid]
    return float(off.square().mean().sqrt())


@each_learner
def test_a_distilled_policy_learns_the_right_force(name: str) -> None:
    alone, distilled = (learner(name, teach=w, lr=3e-3) for w in (0.0, 20.0))
    for i in range(12):
        for one in (alone, distilled):
            metrics = one.update(expert_trials(), 0.0, i)
            assert all(torch.tensor(v).isfinite() for v in metrics.values())
    assert force_error(distilled) < 0.5 * force_error(alone)


@each_learner
def test_nothing_is_left_of_the_teacher_at_the_end(name: str) -> None:
    blank = replace(
        expert_trials(),
        episodes=tuple(
            replace(e, teacher_action=e.teacher_action[..., :0]) for e in expert_trials().episodes
        ),
    )
    alone, distilled = (learner(name, teach=w) for w in (0.0, 20.0))
    alone.update(blank, 1.0, 0)
    distilled.update(expert_trials(), 1.0, 0)
    for a, b in zip(alone.state().values(), distilled.state().values(), strict=True):
        assert torch.equal(a, b)


def test_a_distilled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
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


def test_a_family_without_expert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MetarobotError,
        match=r"CheetahVel has no scripted expert; those that have one: .*GraspShapes",
    ):
        start_run(
            TrainConfig(family="CheetahVel"), agents.get("rl2").config(teach=1.0), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
