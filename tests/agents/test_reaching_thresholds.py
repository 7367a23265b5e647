"""Training to thresholds that no policy without adaptation can reach; minutes each, so ``make
slow`` runs them."""

from functools import partial
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from metarobot.env.base import Env
from metarobot.evaluation.context_ablations import swap_contexts
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import Protocol
from metarobot.evaluation.sinusoid_example import SinusoidConfig, compare
from metarobot.learning.agent_interface import agents
from metarobot.tasks.distributions import Uniform
from metarobot.tasks.family import Family
from metarobot.tasks.space import Param, TaskSpace
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import Run, build_learner
from metarobot.training.train import start_run, train

pytestmark = pytest.mark.slow


def trained(out: Path, family: str, steps: int, agent: str = "rl2", **settings: object) -> Run:
    run = start_run(
        TrainConfig(family=family, agent=agent, steps=steps),
        agents.get(agent).config(**settings),
        out,
    )
    train(run)
    return run


def test_rl2_runs_both_ways_and_a_blind_policy_cannot(tmp_path: Path) -> None:
    """A policy that cannot adapt averages about 0 over the two directions, whatever it does."""
    report = evaluate([trained(tmp_path / "rl2", "CheetahDir", 1_000_000)], Protocol(tasks=20))
    returns = np.array(report["returns"])[0, -1]
    direction = np.array([t["direction"] for t in report["task_values"]])
    assert returns[direction > 0].mean() > 300
    assert returns[direction < 0].mean() > 300
    blind = evaluate(
        [trained(tmp_path / "blind", "CheetahDir", 500_000, "blind")], Protocol(tasks=20)
    )
    assert blind["episodes"][-1]["mean"] < 100


def test_rl2_beats_the_best_policy_that_cannot_adapt(tmp_path: Path) -> None:
    """On CheetahVel that policy has −150."""
    report = evaluate([trained(tmp_path / "rl2", "CheetahVel", 1_600_000)], Protocol(tasks=40))
    assert report["episodes"][-1]["ci95"][0] > -150
    assert report["episodes"][-1]["mean"] > -120


def test_promp_runs_both_ways_after_one_gradient_step_and_fine_tuning_does_not(
    tmp_path: Path,
) -> None:
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


POINT = """
<mujoco>
  <option timestep="0.05" gravity="0 0 0"/>
  <worldbody>
    <body name="point">
      <joint name="x" type="slide" axis="1 0 0" damping="2"/>
      <geom size="0.1" mass="0.5"/>
    </body>
  </worldbody>
  <actuator><motor joint="x" ctrlrange="-2 2" ctrllimited="true"/></actuator>
</mujoco>"""


def toy() -> Family:
    """A point on a line that is to go to a place between −1 and 1 which only the reward tells."""
    return Family(
        name="Toy",
        doc="Go where the reward says.",
        space=TaskSpace(
            "Toy", (Param(name="goal", train=Uniform(-1, 1), unit="m", doc="where to go"),)
        ),
        horizon=16,
        substeps=2,
        spec=lambda: mujoco.MjSpec.from_string(POINT),
        observations=("x_m", "x_m/s"),
        observe=lambda s: torch.cat([s.qpos, s.qvel], 1).float(),
        reward=lambda before, after, dt: {"near": -(after.qpos[:, 0] - after.task["goal"]).abs()},
        weights={"near": 1.0},
        start=lambda rng, model: (rng.uniform(-0.1, 0.1, 1), np.zeros(1)),
    )


def test_pearl_goes_where_the_reward_says_and_another_tasks_context_leads_astray() -> None:
    family = toy()
    settings = {
        "worlds": 16,
        "width": 48,
        "tasks": 16,
        "batch": 16,
        "context": 24,
        "gradient_steps": 150,
        "lr": 2e-3,
        "replay": 10_000,
    }
    learner = build_learner("pearl", agents.get("pearl").config(**settings), family, 0)
    env = Env(family, family.space.sample("train", 16), threads=1)
    for i in range(16):
        tasks = family.space.sample("train", 16, [0, i])
        learner.update(collect(learner.agent, env, tasks, episodes=3, seed=i), i / 16, i)
    tasks = family.space.sample("test", 40, 0)
    collect_test_trials = partial(
        collect,
        learner.agent,
        Env(family, tasks, threads=1),
        tasks,
        episodes=3,
        seed=0,
        explore=False,
    )
    trials, astray = (
        collect_test_trials(),
        collect_test_trials(between=partial(swap_contexts, tasks)),
    )
    first, *_, last = trials.returns().mean(1).tolist()
    # standing still in the middle, which is best without knowing, earns −0.5 a step
    assert last > -0.35 * family.horizon
    assert first < -0.4 * family.horizon
    assert astray.returns()[-1].mean() < last - 0.2 * family.horizon
    context = learner.agent.begin(40)
    for episode in trials.episodes[:2]:
        context = learner.agent.adapt(context, episode)
    mean, var = learner.agent.belief(context)
    assert (mean - trials.task).abs().mean() < 0.2
    assert 0.3 < ((mean - trials.task).square() / var).mean() < 3.0
