"""Run exported agents in the simulated robot's closed loop, and compare with their evaluation.

    python scripts/robot_loop.py walk [--tasks 40] [--lockstep] [--json walk.json]
    python scripts/robot_loop.py step [--tasks 40] [--json step.json]
    python scripts/robot_loop.py reward [--tasks 24] [--json reward.json]

``walk``: QuadrupedDamage's RL² on a Go2 with broken joints, in real time (8 s a task), its reward
computed from the robot's own signals. ``step``: ProMP's one gradient step on CheetahDir100, in
lock-step, by the adaptation process beside the controller. Both run the tasks of ``metarobot
evaluate`` with the same seed, in another process, through the controller's limits. ``reward``: the
reward computed from the robot's signals against the true one, term by term.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.adaptation_client import AdaptationClient
from metarobot.bridge.controller import Controller
from metarobot.bridge.layouts.legged import LeggedLayout
from metarobot.bridge.loop_timing import LoopClock, MonotonicClock, SteppedClock
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.robot_interface import Reading
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.robots.sim_client import SimRobotClient
from metarobot.bridge.run_report import RunReport, RunSettings
from metarobot.deploy.onnx_export import export
from metarobot.evaluation.protocol import Evaluator, Protocol
from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.files import write_json
from metarobot.training.run_folder import open_run

WALKING_AGENT = "QuadrupedDamage-rl2"
STEPPING_AGENT = "CheetahDir100-promp"
ADAPTATION_DEADLINE_S = 600.0

Terms = dict[str, float]
"""Name of a reward term -> value before its weight."""


class TrueReturns:
    """Record each episode's true return, which the simulator knows, when the controller ends it.

    It is the controller's ``show_message``.
    """

    def __init__(self, robot: SimRobotClient, episodes: int) -> None:
        self.robot = robot
        self.episodes = episodes
        """Number of episodes expected."""
        self.returns: list[float] = []
        self.fallen = 0

    def __call__(self, line: str) -> None:
        episode_ended = line.startswith("trial ")
        if episode_ended:
            episode = self.robot.report()["told"]
            self.returns.append(episode["return"])
            self.fallen += episode["terminated"]
        if not episode_ended or len(self.returns) % max(1, self.episodes // 20) == 0:
            print(f"{len(self.returns)}/{self.episodes}  {line}", flush=True)


def run_trials(
    policy: OnnxPolicy,
    robot: SimRobotClient,
    tasks: int,
    adaptation: AdaptationClient | None = None,
) -> tuple[RunReport, TrueReturns]:
    """Run one trial in each task through the controller."""
    rollouts = 1 if adaptation is None else adaptation.rollouts
    robot.connect()
    true_returns = TrueReturns(robot, tasks * rollouts * policy.meta.trial.episodes)
    clock: LoopClock = SteppedClock() if robot.info["lockstep"] else MonotonicClock()
    try:
        controller = Controller(
            policy,
            robot,
            robots.make_layout(policy.meta),
            RunSettings(hz=policy.meta.control_hz, trials=tasks, damp_s=0.1),
            clock=clock,
            adaptation=adaptation,
            show_message=true_returns,
        )
        report = controller.run()
    finally:
        robot.disconnect()
    done = len(true_returns.returns)
    if done != true_returns.episodes:
        raise SystemExit(
            f"the run ended after {done} of {true_returns.episodes} episodes: {report.reason}"
        )
    return report, true_returns


def compare_episodes(
    robot: NDArray[np.float64], evaluation: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Compare returns ``(episode, task)`` of loop and evaluation, task by task."""
    rows: list[dict[str, Any]] = []
    for k in range(len(robot)):
        difference = robot[k] - evaluation[k]
        row: dict[str, Any] = {"episode": k}
        columns = {"robot": robot[k], "evaluation": evaluation[k], "difference": difference}
        for name, values in columns.items():
            row[name] = float(values.mean())
            row[f"{name}_ci95"] = bootstrap_interval(values[None], np.mean)
        rows.append(row)

    # How much the agent gains from the first to the last episode
    for name, returns in (("robot", robot), ("evaluation", evaluation)):
        gain = returns[-1] - returns[0]
        rows[-1][f"{name}_gain"] = float(gain.mean())
        rows[-1][f"{name}_gain_ci95"] = bootstrap_interval(gain[None], np.mean)
    return rows


def evaluation_returns(name: str, tasks: int) -> NDArray[np.float64]:
    """Return the returns of ``metarobot evaluate``, ``(episode, task)``."""
    run = open_run(name)
    evaluator = Evaluator(run.family, Protocol(tasks=tasks, threads=1))
    return np.asarray(evaluator.play(run.load_agent(), run.rollouts).returns)


def export_and_load(name: str) -> OnnxPolicy:
    """Export an agent and load the policy."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy"
        export(open_run(name), path)
        return OnnxPolicy.load(path)


def compare_with_evaluation(
    name: str, tasks: int, *, lockstep: bool, adapts_between: bool
) -> dict[str, Any]:
    """Run an agent's tasks in the loop and in evaluation, and report."""
    policy = export_and_load(name)
    adaptation = None
    if adapts_between:
        adaptation = AdaptationClient(policy.meta, run=name, deadline_s=ADAPTATION_DEADLINE_S)
    robot = SimRobotClient(policy.meta, tasks=tasks, lockstep=lockstep)
    report, true_returns = run_trials(policy, robot, tasks, adaptation)

    # Mean over the rollouts of an episode, then (episode, task)
    shape = (tasks, policy.meta.trial.episodes, -1)
    true = np.array(true_returns.returns).reshape(shape).mean(2).T
    computed = np.array(list(itertools.chain(*report.returns))).reshape(shape).mean(2).T
    return {
        "agent": name,
        "tasks": tasks,
        "lockstep": lockstep,
        "rollouts": 1 if adaptation is None else adaptation.rollouts,
        "episodes": compare_episodes(true, evaluation_returns(name, tasks)),
        "reckoned": computed.mean(1).tolist(),
        "fallen": true_returns.fallen,
        "refused": sum("kept the old" in line for line in report.adapted),
        "adaptations": len(report.adapted),
        "pace": report.pace,
        "limited": report.limited,
        "returns": true.round(3).tolist(),
    }


def episode_reward_terms(
    policy: OnnxPolicy, layout: LeggedLayout, robot: SimRobotClient, episode: int, reward: float
) -> tuple[list[tuple[Terms, Terms]], float]:
    """Run an episode without a controller, with the reward of the episode before it.

    Returns the true and the computed terms of each step, and the last computed reward.
    """
    assert policy.meta.reward is not None
    robot.restart(episode)
    layout.begin()
    reading: Reading = robot.get_observation()
    last_action = np.zeros(len(policy.meta.action.names), np.float32)
    sums: Terms = dict.fromkeys(policy.meta.reward["weights"], 0.0)
    pairs: list[tuple[Terms, Terms]] = []
    for step in range(policy.meta.trial.horizon):
        episode_ended = step == 0 and episode > 0
        action = policy.act(layout.observe(reading, last_action), reward, episode_ended)
        robot.send_action(layout.targets(action))
        after = robot.get_observation()
        reward = layout.reward(reading, after, action, last_action)

        # The simulator reports sums over the episode so far
        truth = robot.report()["told"]
        if truth["steps"] == step + 1:
            true_terms = {name: truth["terms"][name] - sums[name] for name in sums}
            pairs.append((true_terms, dict(layout.terms)))
        sums = truth["terms"]
        last_action = action
        reading = after
        if truth["terminated"] or layout.ended(reading):
            break
    return pairs, reward


def compare_rewards(tasks: int) -> dict[str, Any]:
    """Compare the reward computed from noisy signals with the true one, term by term."""
    policy = export_and_load(WALKING_AGENT)
    assert policy.meta.reward is not None
    weights = dict(policy.meta.reward["weights"])
    layout = LeggedLayout(policy.meta)
    robot = SimRobotClient(policy.meta, tasks=tasks, lockstep=True)

    pairs: list[tuple[Terms, Terms]] = []
    reward = 0.0
    robot.connect()
    for task in range(tasks):
        robot.select_task(task)
        policy.begin()
        for episode in range(policy.meta.trial.episodes):
            steps, reward = episode_reward_terms(policy, layout, robot, episode, reward)
            pairs += steps
    robot.disconnect()

    true = np.array([[terms[name] for name in weights] for terms, _ in pairs])
    computed = np.array([[terms[name] for name in weights] for _, terms in pairs])
    rows: dict[str, dict[str, float]] = {}
    for i, (name, weight) in enumerate(weights.items()):
        rows[name] = {
            "weight": weight,
            "true": true[:, i].mean(),
            "bias": (computed - true)[:, i].mean(),
            "correlation": np.corrcoef(computed[:, i], true[:, i])[0, 1],
        }

    weight_vector = np.array(list(weights.values()))
    true_reward = true @ weight_vector
    computed_reward = computed @ weight_vector
    error = computed_reward - true_reward
    rows["reward"] = {
        "weight": 1.0,
        "true": true_reward.mean(),
        "bias": error.mean(),
        "correlation": np.corrcoef(true_reward, computed_reward)[0, 1],
        "deviation": true_reward.std(),
        "rms": math.sqrt(np.square(error).mean()),
    }
    rounded = {
        name: {key: round(float(value), 4) for key, value in row.items()}
        for name, row in rows.items()
    }
    return {"agent": WALKING_AGENT, "tasks": tasks, "steps": len(pairs), "terms": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("walk", "step", "reward"))
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument(
        "--lockstep", action="store_true", help="as fast as it goes, not in real time"
    )
    parser.add_argument("--json", type=Path, help="report to write")
    args = parser.parse_args()

    if args.what == "reward":
        report = compare_rewards(args.tasks)
        for name, row in report["terms"].items():
            print(f"{name:8s} {'  '.join(f'{key} {value:+.3f}' for key, value in row.items())}")
    else:
        walks = args.what == "walk"
        report = compare_with_evaluation(
            WALKING_AGENT if walks else STEPPING_AGENT,
            args.tasks,
            lockstep=args.lockstep or not walks,
            adapts_between=not walks,
        )
        for row in report["episodes"]:
            print("  ".join(f"{key} {np.round(value, 1)}" for key, value in row.items()))
    if args.json is not None:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
