"""Learners of agents with and without memory, on trials with early ends."""

import torch

from metarobot.env.base import Env
from metarobot.learning.agent_interface import Dimensions, Learner, agents
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.types import Trials

FAMILY = families.get("CheetahTerrain").replace(
    horizon=12, terminate=lambda state: state.qvel[:, 0].abs() > 0.8
)
TASKS = FAMILY.space.sample("train", 6, 0)
SHAPES = Dimensions(obs=17, act=6, task=len(FAMILY.space.params), episodes=2)


def build(name: str, seed: int = 0, **settings) -> Learner:
    torch.manual_seed(seed)
    kind = agents.get(name)
    return kind.build(
        kind.config(worlds=6, width=16, **{"minibatches": 2, "epochs": 2} | settings), SHAPES
    )


def live(learner: Learner, seed: int = 0, explore: bool = True) -> Trials:
    """Collect trials with early ends, so that there is padding between and after the episodes."""
    trials = collect(
        learner.agent, Env(FAMILY, TASKS, threads=1), TASKS, episodes=2, seed=seed, explore=explore
    )
    assert not (explore and all(e.valid.all() for e in trials.episodes))
    return trials


def skilled(name: str, **settings) -> Learner:
    """A learner whose normaliser has seen data and whose actions are far from zero."""
    learner = build(name, **settings)
    learner.update(live(learner), 0.0, 0)
    with torch.no_grad():
        for p in learner.agent.parameters():
            p += 0.2 * torch.randn_like(p)
    return learner
