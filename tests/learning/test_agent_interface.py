"""What the registered agents declare that they can do."""

import inspect
from functools import cache
from typing import get_type_hints

import pytest
import torch
from torch import nn

from metarobot.config_bounds import Bounds, check_bounds
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import (
    AgentKind,
    Dimensions,
    DrawsNoise,
    EmbedsTasks,
    FeedforwardPolicy,
    FineTunes,
    InfersPosterior,
    Learner,
    MeasuresDivergence,
    NamesContext,
    ReservesMemory,
    Stateful,
    WarmStarts,
    agents,
    comparable_agents,
)

GRADIENT_BASED = {"fomaml", "maml", "maml-ppo", "promp", "reptile"}
OF_AGENTS = {
    DrawsNoise: {"pearl"},
    NamesContext: GRADIENT_BASED | {"imitation", "pearl", "varibad"},
    InfersPosterior: {"pearl", "varibad"},
    EmbedsTasks: {"prototype"},
    FeedforwardPolicy: {"blind", "oracle", "ppo"},
    FineTunes: GRADIENT_BASED,
    MeasuresDivergence: GRADIENT_BASED,
}
OF_LEARNERS = {
    WarmStarts: {"blind", "oracle", "ppo", "prototype", "rl2", "rl2-oracle"},
    ReservesMemory: {"pearl"},
}
SHAPES = Dimensions(obs=7, act=2, task=3, episodes=2, horizon=10)


@cache
def build(name: str) -> Learner:
    kind = agents.get(name)
    small = {"replay": 1000} if "replay" in kind.config.__dataclass_fields__ else {}
    torch.manual_seed(0)
    return kind.build(kind.config(**small), SHAPES)


def names() -> list[str]:
    return [name for name in agents.names() if not name.startswith("sb3:") or has_sb3()]


@cache
def has_sb3() -> bool:
    try:
        return bool(agents.get("sb3:ppo"))
    except MetarobotError:
        return False


@pytest.mark.parametrize("protocol", OF_AGENTS)
def test_exactly_the_right_agents_declare_a_capability(protocol: type) -> None:
    declared = {name for name in names() if isinstance(build(name).agent, protocol)}
    assert declared == OF_AGENTS[protocol]


@pytest.mark.parametrize("protocol", OF_AGENTS)
def test_capabilities_are_seen_without_the_attribute_hooks_of_modules(protocol: type) -> None:
    """Since Python 3.12 isinstance looks members up statically: no submodules, no parameters."""
    members = [name for name in {**protocol.__annotations__, **vars(protocol)} if name[0] != "_"]
    assert members
    for name in OF_AGENTS[protocol]:
        for member in members:
            inspect.getattr_static(build(name).agent, member)


@pytest.mark.parametrize("protocol", OF_LEARNERS)
def test_exactly_the_right_learners_declare_a_capability(protocol: type) -> None:
    declared = {name for name in names() if isinstance(build(name), protocol)}
    assert declared == OF_LEARNERS[protocol]


@pytest.mark.parametrize("name", names())
def test_every_agent_has_the_three_verbs_and_every_learner_its_methods(name: str) -> None:
    learner = build(name)
    agent = learner.agent
    assert isinstance(agent, nn.Module)
    assert isinstance(agent.privileged, bool)
    assert isinstance(agent.explores, bool)
    for verb in (agent.begin, agent.act, agent.adapt, learner.update):
        assert callable(verb)
    assert isinstance(learner, Stateful)
    assert isinstance(agents.get(name), AgentKind)


@pytest.mark.parametrize("name", names())
def test_every_number_of_a_configuration_has_bounds_that_its_default_keeps(name: str) -> None:
    config = agents.get(name).config
    check_bounds(config())
    hints = get_type_hints(config, include_extras=True)
    for field, hint in hints.items():
        value = getattr(config(), field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            bounds = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Bounds)]
            assert bounds, field
            assert bounds[0].low is not None, field


def test_comparable_agents_are_one_of_each_kind_that_learns_from_its_own_trials() -> None:
    comparable = comparable_agents()
    assert {"blind", "maml", "rl2"} <= set(comparable)
    # ppo is blind under another name, and imitation learns from demonstrations
    assert not {"ppo", "imitation"} & set(comparable)
