import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metarobot.cli.main import main
from metarobot.env.base import Env
from metarobot.learning.agent_interface import Dimensions, Learner, agents
from metarobot.learning.maml_agent import GradientAgent, InnerBatch
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import Run
from metarobot.training.train import start_training
from metarobot.types import Rollout, Trials


def tiny_run(
    out: Path,
    agent: str = "rl2",
    family: str = "CheetahDir100",
    seed: int = 0,
    steps: int = 1600,
    **settings: Any,
) -> Run:
    """Train for a few small iterations: real weights and a real run folder, no skill."""
    kind, small = (
        agents.get(agent).config,
        {"worlds": 4, "rollouts": 2, "minibatches": 2, "epochs": 2, **settings},
    )
    config = kind(**{k: v for k, v in small.items() if k in kind.__dataclass_fields__})
    settings = TrainConfig(
        family=family, agent=agent, steps=steps, seed=seed, threads=1, save_every=1
    )
    training = start_training(settings, config, out)
    assert training.train(show=False)
    return training.run


def written(path: Path, root: ET.Element, **renamed: str) -> str:
    """A model written to a file, some of its names changed; the path."""
    text = ET.tostring(root, encoding="unicode")
    for old, new in renamed.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    path.write_text(text)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """The command line: its exit code, and what it printed to both streams."""
    code = 0
    try:
        main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


WITH_CRITIC = ("fomaml", "maml", "maml-ppo", "promp")
"""Learners of an agent that adapts by gradient; their outer objective has a critic."""
each_with_critic = pytest.mark.parametrize("name", WITH_CRITIC)
each_agent = pytest.mark.parametrize("name", [*WITH_CRITIC, "reptile"])
SHAPES = Dimensions(obs=17, act=6, task=1, episodes=2)
STEADY = replace(families.get("CheetahDir100"), horizon=12)
FALLING = STEADY.replace(terminate=lambda state: state.qvel[:, 0].abs() > 1.2)
TASKS = [STEADY.space.task(direction=d) for d in (1.0, -1.0)]
ROLLOUTS = 3
IN_TIME = ("obs", "action", "reward", "terminated", "truncated", "valid")


def build(name: str, seed: int = 0, **settings: Any) -> Any:
    """A learner of a policy that is not zero; the same policy for all learners."""
    torch.manual_seed(seed)
    kind = agents.get(name)
    usual = {
        "worlds": len(TASKS) * ROLLOUTS,
        "rollouts": ROLLOUTS,
        "width": 8,
        "std": 0.6,
        "inner_lr": 0.05,
    }
    learner = kind.build(kind.config(**usual | settings), SHAPES)
    torch.manual_seed(seed + 1)  # the same generator state with and without a critic
    with torch.no_grad():
        for p in learner.agent.policy.parameters():
            p += 0.1 * torch.randn_like(p)
    return learner


def collect_trials(
    agent: GradientAgent, family: Any = FALLING, seed: int = 0, episodes: int = 2, **settings: Any
) -> Trials:
    rollouts = agent.config.rollouts
    env = Env(family, [t for t in TASKS for _ in range(rollouts)], threads=1)
    return collect(agent, env, TASKS, episodes=episodes, seed=seed, rollouts=rollouts, **settings)


@cache
def example_trials(episodes: int = 2) -> Trials:
    """Trials of an untrained agent, with early ends and so with padding."""
    trials = collect_trials(build("maml").agent, episodes=episodes)
    assert not all(e.valid.all() for e in trials.episodes)
    return trials


def episode() -> Rollout:
    return example_trials().episodes[0]


def changed(rollout: Rollout, **values: Callable[[Tensor], None]) -> Rollout:
    """A rollout with some of its tensors changed in place, in a copy."""
    copies = {k: getattr(rollout, k).clone() for k in values}
    for k, change in values.items():
        change(copies[k])
    return replace(rollout, **copies)


def changed_trials(**values: Callable[[Tensor], None]) -> Trials:
    """The example trials with every episode changed."""
    return replace(
        example_trials(),
        episodes=tuple(changed(e, **values) for e in example_trials().episodes),
    )


def fill(where: Any, value: float) -> Callable[[Tensor], None]:
    return lambda x: x.__setitem__(where, value)


EMPTY = {
    "all broken": {"reward": fill(slice(None), float("nan"))},
    "all broken observations": {"obs": fill(slice(None), float("inf"))},
    "no valid steps": {"valid": fill(slice(None), False)},
}
"""Changes after which an episode holds nothing to learn from."""


def adapted(agent: GradientAgent, rollout: Rollout) -> Tensor:
    (weights,) = agent.adapt(agent.begin(rollout.valid.shape[1] // agent.config.rollouts), rollout)
    return weights


def initial(agent: GradientAgent) -> Tensor:
    return agent.begin(len(TASKS))[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor], *but: str) -> bool:
    """Whether all tensors are the same, but those with one of some words in their names."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a if not any(word in k for word in but))


def finite(learner: Learner) -> bool:
    return all(bool(v.isfinite().all()) for v in learner.state().values())


def in_float64(
    name: str, episodes: int = 2, **settings: Any
) -> tuple[Any, Tensor, list[InnerBatch], InnerBatch]:
    """A learner in float64, its meta-parameters, and batches of real trials."""
    learner = build(name, episodes=episodes, **settings)
    learner.agent.double()
    *support, query = learner.agent.batches(example_trials(episodes))
    return learner, learner.agent.meta_parameters(), support, query


def directions(n: int, size: int) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def directional_derivative(
    f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-5
) -> Tensor:
    """Central difference."""
    return (f(x + h * v) - f(x - h * v)) / (2 * h)
