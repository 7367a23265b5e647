"""Learners of agents with and without memory, and trials with early ends for them."""

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
    """Build a small learner, the same weights for the same seed."""
    torch.manual_seed(seed)
    kind = agents.get(name)
    small = {"worlds": 6, "width": 16, "minibatches": 2, "epochs": 2}
    return kind.build(kind.config(**small | settings), SHAPES)


def collect_trials(learner: Learner, seed: int = 0, explore: bool = True) -> Trials:
    """Collect trials with early ends, so that there is padding between and after the episodes."""
    env = Env(FAMILY, TASKS, threads=1)
    trials = collect(learner.agent, env, TASKS, episodes=2, seed=seed, explore=explore)
    if explore:
        assert not all(episode.valid.all() for episode in trials.episodes)
    return trials


def build_perturbed(name: str, **settings) -> Learner:
    """Build a learner with an updated normaliser, whose actions are far from zero."""
    learner = build(name, **settings)
    learner.update(collect_trials(learner), 0.0, 0)
    with torch.no_grad():
        for parameter in learner.agent.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return learner
