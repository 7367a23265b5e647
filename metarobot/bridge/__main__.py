"""``python -m metarobot.bridge``: ``metarobot run`` for machines with numpy and onnxruntime alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metarobot.bridge import run
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.run import Options

HELP = {
    "robot": "sim, ros2, unitree, or module:Class of your own",
    "set": "settings of the robot, name=value",
    "hz": "control rate; the policy's own if not given",
    "any_rate": "run at a rate that the policy was not trained for",
    "seconds": "when to stop",
    "trials": "stop after so many trials; 0: as many as there is time for",
    "episodes": "episodes a trial; 0: as many as the policy was trained for",
    "command": "for walkers: forward and sideways velocity, m/s, and turn, rad/s",
    "log": "MCAP file to write every step to",
    "adapt": "let an agent that adapts between episodes do so, in a process that has torch",
    "rollouts": "episodes to live before each adaptation",
    "kl": "how far an adaptation may move the policy, KL divergence",
    "run": "run folder that adapts; the one the policy was exported from if not given",
    "ready_s": "how long the robot takes to the pose that an episode begins with",
    "soft_s": "how long commands are blended in at an episode's start",
    "rate": "how fast a target may move, as a multiple of the joint's speed limit",
    "seed": "draws the noise of agents that explore",
    "plain": "show lines, not a panel",
}


def parser() -> argparse.ArgumentParser:
    """Make the command line out of ``Options``."""
    made = argparse.ArgumentParser("python -m metarobot.bridge", description="Run an exported policy on a robot.")
    made.add_argument("policy", help="policy folder that metarobot export wrote")
    for name, usual in vars(Options()).items():
        how: dict[str, Any] = {"default": usual, "help": HELP[name]}
        if isinstance(usual, bool):
            how["action"] = "store_true"
        elif name in ("set", "command"):
            how |= {"nargs": "*", "type": str} if name == "set" else {"nargs": 3, "type": float}
        else:
            how["type"] = Path if name == "log" else type(usual)
        made.add_argument(f"--{name.replace('_', '-')}", **how)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; a mistake is one line on standard error and exit code 2."""
    told = vars(parser().parse_args(arguments))
    folder = told.pop("policy")
    told |= {name: tuple(told[name]) for name in ("set", "command")}
    try:
        report = run.run(folder, Options(**told))
    except BridgeError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    run.tell(report)
    sys.exit(run.code(report))


if __name__ == "__main__":
    main()
