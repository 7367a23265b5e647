"""Measure how much of each plausibility limit a simulated robot uses.

    python scripts/plausibility_margins.py [AGENT] [--tasks 20] [--quiet]

The robot runs the agent's trials in lock-step through the controller, with every check in force:
broken joints, sensor noise and falls are what they are in training. A limit of which 100 % is used
would have damped the robot, a false alarm.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarobot.bridge.controller import Controller
from metarobot.bridge.loop_timing import SteppedClock
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.robots.lookup import make_layout
from metarobot.bridge.robots.sim_client import SimRobotClient
from metarobot.bridge.run_report import RunReport, RunSettings
from metarobot.bridge.safety.plausibility_checks import PlausibilityChecker
from metarobot.deploy.onnx_export import export
from metarobot.training.run_folder import open_run

LIMITS = ("angle", "speed", "torque", "mean speed mismatch", "mean tracking error", "jump")
"""Rows of ``PlausibilityChecker.used``."""


class Margins(NamedTuple):
    """What a run used."""

    used: np.ndarray
    """Largest share of each limit, ``(limit,)``."""
    ticks: int
    report: RunReport


class WatchedChecker(PlausibilityChecker):
    """A checker that remembers the largest share used of each limit."""

    largest: np.ndarray | None = None
    checks = 0

    def check(self, *arguments: Any, **keywords: Any) -> None:
        """Check, and remember."""
        super().check(*arguments, **keywords)
        self.checks += 1
        used = self.used.max(1)
        self.largest = used if self.largest is None else np.maximum(self.largest, used)


def measure_margins(agent: str, tasks: int, noise: bool = True) -> Margins:
    """Run an agent's trials on a simulated robot of its family."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy"
        export(open_run(agent), path)
        policy = OnnxPolicy.load(path)

    robot = SimRobotClient(policy.meta, tasks=tasks, lockstep=True, noise=noise)
    robot.connect()
    try:
        layout = make_layout(policy.meta)
        settings = RunSettings(hz=policy.meta.control_hz, trials=tasks)
        controller = Controller(policy, robot, layout, settings, clock=SteppedClock())
        checker = WatchedChecker(policy.meta, layout.needed(), 1 / policy.meta.control_hz)
        # The controller's angles and speeds are views of its checker's
        controller._pos = checker.pos
        controller._vel = checker.vel
        controller._plausibility = checker
        report = controller.run()
    finally:
        robot.disconnect()
    assert checker.largest is not None
    return Margins(checker.largest, checker.checks, report)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", nargs="?", default="QuadrupedDamage-rl2")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--quiet", action="store_true", help="sensors without noise")
    options = parser.parse_args()

    margins = measure_margins(options.agent, options.tasks, not options.quiet)
    print(f"{options.agent}, {options.tasks} tasks, {margins.ticks:,} readings")
    for name, share in zip(LIMITS, margins.used, strict=True):
        print(f"{name:>20}: {100 * share:3.0f} % of the limit")
    print(f"ended: {margins.report.reason}")


if __name__ == "__main__":
    main()
