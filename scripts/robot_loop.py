"""Run exported agents in the simulated robot's closed loop, and compare how they adapt there with
their evaluation.

    python scripts/robot_loop.py walk [--tasks 40] [--lockstep] [--json
    results/robot-QuadrupedDamage.json] python scripts/robot_loop.py step [--tasks 40] [--json
    results/robot-CheetahDir100.json] python scripts/robot_loop.py reward [--tasks 24] [--json
    results/robot-reward.json]

``walk``: QuadrupedDamage's RL2 on a Go2 with broken joints, by the clock (8 s a task), its reward
reckoned from its own signals; ``step``: ProMP's one gradient step on CheetahDir100, in lock-step,
by the process that adapts beside the controller. Both live the tasks of ``metarobot evaluate`` with
the same seed, in another process, through the controller's limits. ``reward``: the reckoned reward
against the true one, term by term.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from metarobot.bridge.adaptation_client import AdaptationClient
from metarobot.bridge.controller import Controller
from metarobot.bridge.loop_timing import MonotonicClock, SteppedClock
from metarobot.bridge.policy.metadata import PolicyMetadata
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

WALKER, STEPPER = "QuadrupedDamage-rl2", "CheetahDir100-promp"


class Told:
    """Writes down what each episode really earned, as the simulator knows it, when the controller
    says it is over."""

    def __init__(self, robot: SimRobotClient, tasks: int, each: int) -> None:
        self.robot, self.wanted = robot, tasks * each
        self.returns: list[float] = []
        self.fallen = 0

    def __call__(self, line: str) -> None:
        if line.startswith("trial "):
            told = self.robot.report()["told"]
            self.returns.append(told["return"])
            self.fallen += told["terminated"]
        if len(self.returns) % max(1, self.wanted // 20) == 0 or not line.startswith("trial "):
            print(f"{len(self.returns)}/{self.wanted}  {line}", flush=True)


def drive(
    policy: OnnxPolicy,
    robot: SimRobotClient,
    tasks: int,
    adaptation: AdaptationClient | None = None,
) -> tuple[RunReport, Told]:
    """Live a trial in each task through the controller."""
    rollouts = 1 if adaptation is None else adaptation.rollouts
    robot.connect()
    told = Told(robot, tasks, rollouts * policy.meta.trial.episodes)
    try:
        controller = Controller(
            policy,
            robot,
            robots.make_layout(policy.meta),
            RunSettings(hz=policy.meta.control_hz, trials=tasks, damp_s=0.1),
            clock=SteppedClock() if robot.info["lockstep"] else MonotonicClock(),
            adaptation=adaptation,
            show_message=told,
        )
        report = controller.run()
        if len(told.returns) != told.wanted:
            raise SystemExit(
                f"the run ended after {len(told.returns)} of {told.wanted} episodes: {report.reason}"
            )
        return report, told
    finally:
        robot.disconnect()


def compared(robot: np.ndarray, evaluation: np.ndarray) -> list[dict[str, Any]]:
    """Set returns ``(episode, task)`` of the loop beside those of the evaluation, and compare them
    task by task."""
    rows = []
    for k, (here, there) in enumerate(zip(robot, evaluation, strict=True)):
        apart = here - there
        rows.append(
            {
                "episode": k,
                "robot": float(here.mean()),
                "robot_ci95": bootstrap_interval(here[None], np.mean),
                "evaluation": float(there.mean()),
                "evaluation_ci95": bootstrap_interval(there[None], np.mean),
                "difference": float(apart.mean()),
                "difference_ci95": bootstrap_interval(apart[None], np.mean),
            }
        )
    gains = [x[-1] - x[0] for x in (robot, evaluation)]
    for name, gain in zip(("robot", "evaluation"), gains, strict=True):
        rows[-1] |= {
            f"{name}_gain": float(gain.mean()),
            f"{name}_gain_ci95": bootstrap_interval(gain[None], np.mean),
        }
    return rows


def evaluated(name: str, tasks: int) -> np.ndarray:
    """Return what ``metarobot evaluate`` finds: ``(episode, task)``."""
    run = open_run(name)
    arena = Evaluator(run.family, Protocol(tasks=tasks, threads=1))
    return arena.play(run.load_agent(), run.rollouts).returns


def play(name: str, tasks: int, *, lockstep: bool, between: bool) -> dict[str, Any]:
    """Export an agent, live the tasks in the loop and in evaluation, and report."""
    with tempfile.TemporaryDirectory() as folder:
        export(open_run(name), Path(folder) / "policy")
        policy = OnnxPolicy.load(Path(folder) / "policy")
        adaptation = AdaptationClient(policy.meta, run=name, deadline_s=600) if between else None
        robot = SimRobotClient(policy.meta, tasks=tasks, lockstep=lockstep)
        report, told = drive(policy, robot, tasks, adaptation)
    shape = (tasks, policy.meta.trial.episodes, -1)
    true = np.array(told.returns).reshape(shape).mean(2).T
    reckoned = np.array(list(itertools.chain(*report.returns))).reshape(shape).mean(2).T
    return {
        "agent": name,
        "tasks": tasks,
        "lockstep": lockstep,
        "rollouts": 1 if adaptation is None else adaptation.rollouts,
        "episodes": compared(true, evaluated(name, tasks)),
        "reckoned": reckoned.mean(1).tolist(),
        "fallen": told.fallen,
        "refused": sum("kept the old" in line for line in report.adapted),
        "adaptations": len(report.adapted),
        "pace": report.pace,
        "limited": report.limited,
        "returns": true.round(3).tolist(),
    }


def rewards(tasks: int) -> dict[str, Any]:
    """Compare the reckoned reward with the true one on noisy signals, term by term."""
    with tempfile.TemporaryDirectory() as folder:
        export(open_run(WALKER), Path(folder) / "policy")
        policy = OnnxPolicy.load(Path(folder) / "policy")
    layout, pairs = Watched(policy.meta), []
    robot = SimRobotClient(policy.meta, tasks=tasks, lockstep=True)
    robot.connect()
    for task in range(tasks):
        robot.select_task(task)
        policy.begin()
        for episode in range(policy.meta.trial.episodes):
            pairs += layout.live(policy, robot, episode)
    robot.disconnect()
    true, own = (np.array([[p[i][k] for k in layout.weights] for p in pairs]) for i in (0, 1))
    weight = np.array(list(layout.weights.values()))
    rows = {
        name: {
            "weight": weight[i],
            "true": true[:, i].mean(),
            "bias": (own - true)[:, i].mean(),
            "correlation": np.corrcoef(own[:, i], true[:, i])[0, 1],
        }
        for i, name in enumerate(layout.weights)
    }
    whole = np.stack([true @ weight, own @ weight])
    rows["reward"] = {
        "weight": 1.0,
        "true": whole[0].mean(),
        "bias": (whole[1] - whole[0]).mean(),
        "correlation": np.corrcoef(whole)[0, 1],
        "deviation": whole[0].std(),
        "rms": math.sqrt(np.square(whole[1] - whole[0]).mean()),
    }
    return {"agent": WALKER, "tasks": tasks, "steps": len(pairs), "terms": _plain(rows)}


class Watched:
    """A legged layout, its terms written down beside the simulator's."""

    def __init__(self, meta: PolicyMetadata) -> None:
        assert meta.reward is not None
        self.layout, self.weights = robots.make_layout(meta), dict(meta.reward["weights"])
        self.meta, self._earned = meta, 0.0

    def live(
        self, policy: OnnxPolicy, robot: SimRobotClient, episode: int
    ) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Live an episode; return the terms of each step, the simulator's and its own."""
        robot.restart(episode)
        self.layout.begin()
        reading: Reading = robot.get_observation()
        last, sums, pairs = np.zeros(12, np.float32), dict.fromkeys(self.weights, 0.0), []
        for step in range(self.meta.trial.horizon):
            done = step == 0 and episode > 0
            action = policy.act(self.layout.observe(reading, last), self._earned, done)
            robot.send_action(self.layout.targets(action))
            after = robot.get_observation()
            self._earned = self.layout.reward(reading, after, action, last)
            told = robot.report()["told"]
            if told["steps"] == step + 1:
                true = {k: told["terms"][k] - sums[k] for k in sums}
                pairs.append((true, dict(self.layout.terms)))  # type: ignore[attr-defined]
            sums, last, reading = told["terms"], action, after
            if told["terminated"] or self.layout.ended(reading):
                break
        return pairs


def _plain(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {name: {k: round(float(v), 4) for k, v in row.items()} for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("walk", "step", "reward"))
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument(
        "--lockstep", action="store_true", help="as fast as it goes, not by the clock"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "reward":
        report = rewards(args.tasks)
        for name, row in report["terms"].items():
            print(f"{name:8s} {'  '.join(f'{k} {v:+.3f}' for k, v in row.items())}")
    else:
        walks = args.what == "walk"
        report = play(
            WALKER if walks else STEPPER,
            args.tasks,
            lockstep=args.lockstep or not walks,
            between=not walks,
        )
        for row in report["episodes"]:
            print("  ".join(f"{k} {np.round(v, 1)}" for k, v in row.items()))
    if args.json is not None:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
