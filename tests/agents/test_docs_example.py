"""The example agent on the page for authors of agents, run as it stands there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from metarobot.env.base import Env
from metarobot.learning import agent_interface
from metarobot.learning.agent_interface import AgentKind, Context, agents
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import open_run
from metarobot.training.train import Training, open_training, start_training
from metarobot.types import Percept

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"


@pytest.fixture
def feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentKind:
    """Import the page's example as a module of its own, and register it for one test."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "feedback_example.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("feedback_example", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "feedback_example", module)
    spec.loader.exec_module(module)
    # a registered name stays for good, so the entry is set and removed here
    monkeypatch.setitem(agents._items, "feedback", module.feedback)
    return module.feedback


class PowerCutError(Exception):
    """Ends a training in the middle."""


def begin(kind: AgentKind, out: Path) -> Training:
    settings = TrainConfig(
        family="CheetahDir100", agent="feedback", steps=2400, threads=1, save_every=1
    )
    return start_training(settings, kind.config(worlds=4), out)


def test_the_example_trains_and_continues_bit_for_bit(feedback: AgentKind, tmp_path: Path) -> None:
    whole, broken = (begin(feedback, tmp_path / name) for name in ("whole", "broken"))
    assert whole.train(show=False)
    rows = read_metrics(whole.run.folder / "metrics.jsonl")
    assert len(rows) == 3
    assert all("train/policy_gradient_loss" in row for row in rows)

    def cut(metrics: dict[str, float]) -> None:
        if metrics["time/iterations"] == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        broken.train(show=False, tick=cut)
    again = open_training(open_run(broken.run.folder))
    assert again.counters.iteration == 1
    assert again.train(show=False)
    first, second = (training.run.checkpoint()[0] for training in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_example_adapts_to_its_last_episode(feedback: AgentKind, tmp_path: Path) -> None:
    training = begin(feedback, tmp_path / "run")
    assert training.train(show=False)
    family = training.run.family
    agent = training.run.load_agent()
    tasks = family.space.sample("test", 4)
    contexts: list[Context] = []

    def record(context: Context) -> Context:
        contexts.append(context)
        return context

    env = Env(family, tasks, threads=1)
    trials = collect(agent, env, tasks, episodes=2, seed=0, explore=False, between=record)
    first, second = trials.episodes
    ((last_reward,),) = contexts
    assert torch.allclose(last_reward[:, 0], first.reward.mean(0), atol=1e-5)

    zeros = torch.zeros(4)
    percept = Percept(second.obs[0], first.action[-1], first.reward[-1], zeros + 1, zeros)
    with torch.no_grad():
        adapted, _ = agent.act(percept, contexts[0])
        unadapted, _ = agent.act(percept, agent.begin(4))
    assert torch.allclose(adapted, second.action[0], atol=1e-6)
    assert not torch.allclose(unadapted, adapted, atol=1e-4)


def test_the_table_names_every_capability() -> None:
    protocols = [
        name
        for name, value in vars(agent_interface).items()
        if "_is_runtime_protocol" in getattr(value, "__dict__", {})
        and value.__module__ == agent_interface.__name__
        and value is not agent_interface.Stateful
    ]
    assert len(protocols) >= 8
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in protocols)
