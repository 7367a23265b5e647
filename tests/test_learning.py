"""Training to thresholds that no policy without adaptation can reach; minutes each, so ``make slow`` runs them."""

from pathlib import Path

import numpy as np
import pytest

from metarobot.agent import agents
from metarobot.agents.sinusoid import SinusoidConfig, compare
from metarobot.checkpoint import Run
from metarobot.evaluate import Protocol, evaluate
from metarobot.train import TrainConfig, start, train

pytestmark = pytest.mark.slow


def trained(out: Path, family: str, steps: int, agent: str = "rl2", **settings: object) -> Run:
    run = start(TrainConfig(family=family, agent=agent, steps=steps), agents.get(agent).config(**settings), out)
    train(run)
    return run


def test_rl2_runs_both_ways_and_a_blind_policy_cannot(tmp_path: Path) -> None:
    """A policy that cannot adapt averages about 0 over the two directions, whatever it does."""
    report = evaluate([trained(tmp_path / "rl2", "CheetahDir", 1_000_000)], Protocol(tasks=20))
    returns = np.array(report["returns"])[0, -1]
    direction = np.array([t["direction"] for t in report["task_values"]])
    assert returns[direction > 0].mean() > 300
    assert returns[direction < 0].mean() > 300
    blind = evaluate([trained(tmp_path / "blind", "CheetahDir", 500_000, "blind")], Protocol(tasks=20))
    assert blind["episodes"][-1]["mean"] < 100


def test_rl2_beats_the_best_policy_that_cannot_adapt(tmp_path: Path) -> None:
    """On CheetahVel that policy has −150."""
    report = evaluate([trained(tmp_path / "rl2", "CheetahVel", 1_600_000)], Protocol(tasks=40))
    assert report["episodes"][-1]["ci95"][0] > -150
    assert report["episodes"][-1]["mean"] > -120


def test_promp_runs_both_ways_after_one_gradient_step_and_fine_tuning_does_not(tmp_path: Path) -> None:
    blind = trained(tmp_path / "blind", "CheetahDir100", 500_000, "blind")
    promp = trained(tmp_path / "promp", "CheetahDir100", 2_000_000, "promp")
    report = evaluate([promp], Protocol(tasks=20), finetune=[blind])
    returns = np.array(report["returns"])[0, -1]
    direction = np.array([t["direction"] for t in report["task_values"]])
    assert returns[direction > 0].mean() > 30
    assert returns[direction < 0].mean() > 100
    assert report["episodes"][1]["gain_ci95"][0] > 80
    for baseline in report["finetuning"].values():
        assert baseline["episodes"][-1]["mean"] < returns.mean() / 2


def test_maml_regresses_a_new_sinusoid_in_one_step_and_joint_training_does_not() -> None:
    """Finn et al. (2017), section 5.1: ten points, one gradient step."""
    errors = compare(SinusoidConfig()).errors
    assert errors["MAML"][1] < 0.1 * errors["MAML"][0]
    assert errors["MAML"][1] < 0.2 * errors["joint training"][1]
    assert errors["MAML"][-1] < 0.3 * errors["joint training"][-1]
