"""Nothing broken scores: agents, rewards and physics that break down, in everything measured."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run as command
from helpers import tiny_run
from torch import Tensor

from metarobot.env.base import Env
from metarobot.evaluation.compare import Plan, compare_runs
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import (
    EvaluationError,
    Evaluator,
    PlayedReturns,
    Protocol,
    check_actions,
    check_fault_count,
    stack_played,
)
from metarobot.evaluation.tables import comparison_table, evaluation_table
from metarobot.files import read_json, write_json
from metarobot.learning.finite_check import DivergedError
from metarobot.training.run_folder import Run

SMALL = Protocol(tasks=4, episodes=2, threads=1)


class Broken:
    """A run's agent whose actions are a broken value from some step on."""

    privileged = False
    explores = False

    def __init__(self, agent: Any, value: float, after: int) -> None:
        self.agent = agent
        self.value = value
        self.after = after
        self.steps = 0
        self.begin = agent.begin
        self.adapt = agent.adapt

    def act(self, percept: Any, context: Any, noise: Tensor | None = None) -> Any:
        action, context = self.agent.act(percept, context, noise)
        self.steps += 1
        if self.steps > self.after:
            action = action.clone()
            action[-1, -1] = self.value
        return action, context


def faults_at(where: Callable[[Env], Tensor]) -> Callable[[Env, Tensor | None], Tensor]:
    """Physics that break down where asked, ``(world,)``."""
    simulate = Env._simulate

    def faulty(self: Env, active: Tensor | None) -> Tensor:
        return simulate(self, active) | where(self)

    return faulty


def first_world_early(env: Env) -> Tensor:
    """The first world breaks down at the fourth step of each first episode."""
    now = torch.zeros(env.worlds, dtype=torch.bool)
    now[0] = bool(env.elapsed[0] == 3) and int(env.episodes[0]) == 0
    return now


def everywhere(env: Env) -> Tensor:
    return torch.ones(env.worlds, dtype=torch.bool)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [0, 150])
def test_an_agent_whose_actions_are_not_finite_is_refused(
    runs: dict[str, Run], value: float, after: int
) -> None:
    evaluator = Evaluator(runs["rl2"].family, SMALL)
    agent = Broken(runs["rl2"].load_agent(), value, after)
    episode, step = divmod(after, runs["rl2"].family.horizon)
    with pytest.raises(EvaluationError, match=f"mine: actions are .* {episode + 1} at step {step}"):
        evaluator.play(agent, name="mine")


@pytest.mark.parametrize("name", ["rl2", "maml"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str,
    value: float,
    runs: dict[str, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = runs[name]
    real = opened.load_agent()
    tensor_name = next(key for key, x in real.state_dict().items() if x.is_floating_point())
    tensors = {f"agent.{key}": x.clone() for key, x in real.state_dict().items()}
    tensors[f"agent.{tensor_name}"].view(-1)[0] = value

    import metarobot.training.run_folder as module

    class Stored:
        data = b""

        def tensors(self) -> dict[str, Tensor]:
            return tensors

    monkeypatch.setattr(module, "read_checkpoint", lambda folder: Stored())
    monkeypatch.setattr(module, "check_weights", lambda data, expected: None)
    with pytest.raises(DivergedError, match=f"{tensor_name} is {value} in 1 of"):
        opened.load_agent()
    code, _, err = command(capsys, "evaluate", str(opened.folder), "--tasks", "2")
    assert code == 2
    assert "diverged" in err.splitlines()[-1]
    assert tensor_name in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["rl2", "maml", "blind"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_no_result(
    name: str, value: float, runs: dict[str, Run]
) -> None:
    family = runs[name].family

    def reward(before: Any, after: Any, dt: float) -> dict[str, Tensor]:
        return {k: torch.full_like(v, value) for k, v in family.reward(before, after, dt).items()}

    broken = replace(runs[name], family=family.replace(reward=reward))
    with pytest.raises(EvaluationError, match=r"all \d+ episodes faulted"):
        evaluate([broken], SMALL)


def test_physics_that_always_break_down_are_no_result(
    runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Env, "_simulate", faults_at(everywhere))
    code, out, err = command(capsys, "evaluate", str(runs["rl2"].folder), "--tasks", "2")
    assert code == 2
    assert "mean" not in out
    assert err.splitlines()[-1].startswith("error: rl2: all 4 episodes faulted")


@pytest.mark.parametrize("name", ["rl2", "maml"])
def test_a_faulted_episode_counts_as_the_worst_of_all_and_is_counted(
    name: str, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # One episode of 60 is less than the share that fails; the blind policy is worse than it all.
    protocol = Protocol(tasks=30, episodes=2, threads=1)
    sound = evaluate([runs[name]], protocol, blind=[runs["blind"]])
    assert sound["faults"] == {"agent": [0, 0], "blind": [0, 0]}
    assert "faulted" not in evaluation_table(sound)

    monkeypatch.setattr(Env, "_simulate", faults_at(first_world_early))
    report = evaluate([runs[name]], protocol, blind=[runs["blind"]])
    assert report["faults"] == {"agent": [1, 0], "blind": [1, 0]}
    assert "faulted episodes, " in evaluation_table(report)
    json.dumps(report["faults"], allow_nan=False)

    before = np.array(sound["returns"])
    after = np.array(report["returns"])
    untouched = np.ones_like(before, dtype=bool)
    # An agent that adapts has learned from the fault, so only other tasks are as before.
    untouched[..., 0] = False
    assert (before == after)[untouched].all()
    if runs[name].rollouts == 1:
        evaluator = Evaluator(runs[name].family, protocol)
        others = [evaluator.play(runs[k].load_agent()) for k in (name, "blind")]
        worst = min(played.worst for played in others)
        assert after[0, 0, 0] == pytest.approx(worst, abs=1e-3)
        assert after[0, 0, 0] <= before.min() + 1e-3
        assert after[0, 0, 0] != 0.0


def test_too_many_faults_fail_the_command(
    runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Env, "_simulate", faults_at(first_world_early))
    out = str(runs["rl2"].folder)
    code, _, err = command(capsys, "evaluate", out, "--tasks", "4", "--threads", "1")
    assert code == 2
    assert "1 episodes faulted" in err.splitlines()[-1]
    assert "12.5 %" in err.splitlines()[-1]


def test_the_share_that_fails_is_the_stated_one() -> None:
    check_fault_count(5, 0.05, "agent")
    with pytest.raises(EvaluationError, match="more than 5 %"):
        check_fault_count(6, 0.06, "agent")


def played(returns: list[float], faults: list[float], worst: float) -> PlayedReturns:
    share = np.array([faults]) / 2
    return PlayedReturns(np.array([returns]), None, np.array([faults]), share, worst)


def test_another_worst_return_changes_faulted_rollouts_alone() -> None:
    # The second task had one faulted rollout of two: (1 - 3) / 2.
    one = played([1.0, -1.0], [0, 1], -3.0)
    assert one.with_worst(-9.0).returns.tolist() == [[1.0, -4.0]]
    assert one.with_worst(-9.0).with_worst(-3.0).returns.tolist() == one.returns.tolist()
    both = stack_played([one, played([5.0, 6.0], [0, 0], -9.0)])
    assert both.returns.tolist() == [[[1.0, -4.0]], [[5.0, 6.0]]]
    assert both.worst == -9.0


def test_actions_after_broken_rewards_are_not_the_agents_fault(runs: dict[str, Run]) -> None:
    evaluator = Evaluator(runs["rl2"].family, SMALL)
    from metarobot.training.collect import collect

    trials = collect(runs["rl2"].load_agent(), evaluator.env(), evaluator.tasks, episodes=2, seed=0)
    first, second = trials.episodes
    reward = first.reward.clone()
    reward[3, 0] = math.nan
    action = first.action.clone()
    action[4:, 0] = math.nan
    broken = replace(first, reward=reward, action=action)
    later = replace(second, action=action)
    check_actions(replace(trials, episodes=(broken, later)), "agent")
    action[3, 0] = math.nan
    with pytest.raises(EvaluationError, match="episode 1 at step 3 of world 0"):
        check_actions(replace(trials, episodes=(broken, second)), "agent")


def test_a_comparison_ranks_no_faulted_episode_above_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards are negative here, where the environment's 0 would win."""
    runs = {name: [tiny_run(tmp_path / name, agent=name)] for name in ("rl2", "blind")}
    plan = Plan(family="CheetahDir100", out=tmp_path, agents=("rl2", "blind"), threads=1)
    protocol = Protocol(tasks=30, episodes=2, threads=1)
    monkeypatch.setattr(Env, "_simulate", faults_at(first_world_early))
    report = compare_runs(plan, runs, protocol)
    returns = {name: np.array(entry["returns"]) for name, entry in report["agents"].items()}
    worst = min(values.min() for values in returns.values())
    for name, entry in report["agents"].items():
        assert entry["faults"] == [1, 0]
        assert returns[name][0, 0, 0] == worst
        assert all(math.isfinite(row["mean"]) for row in entry["episodes"])
    assert sorted(entry["rank"] for entry in report["agents"].values()) == [1, 2]
    assert comparison_table(report).count("faulted episodes") == 2

    # From the cache it is the same; a cache of before faults were counted is played anew.
    assert compare_runs(plan, runs, protocol) == report
    for path in (tmp_path / "played").iterdir():
        write_json(path, {"key": read_json(path)["key"], "returns": [[0.0] * 30] * 2})
    assert compare_runs(plan, runs, protocol) == report

    plays = []
    monkeypatch.setattr(Evaluator, "play", lambda *args, **more: plays.append(args))
    assert compare_runs(plan, runs, protocol) == report
    assert not plays
