"""Measure what a robot on ROS 2 receives when its controller is killed with ``kill -9``.

    metarobot export QuadrupedFlat-rl2 --out runs/policy
    python scripts/ros_kill.py runs/policy --times 5

A policy drives the peer of scripts/ros_loop.py. The time is from the kill to the first command of
the guard process, by the clock of the rclpy node that receives it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ros_loop import PEER_PYTHON, ros_peer

from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.safety.command_gate import damping_bounds_s
from metarobot.bridge.tools.python_command import python_command

PEER_HZ = 200.0
START_TIMEOUT_S = 120.0
AFTER_KILL_S = 2.0
"""How long the peer records after the kill."""


def run_and_kill(policy: str, domain: int, seconds: float, log: Path) -> float:
    """Run a policy and kill its controller; return when, on the machine's monotonic clock, s."""
    command = [
        *python_command("metarobot.bridge", policy),
        *("--robot", "ros2", "--plain", "--set", f"domain={domain}", "timeout=60"),
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    # The peer's log holds the commands that arrived
    started = time.monotonic()
    while not log.exists() or not log.stat().st_size:
        if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
            sys.exit("the controller sent nothing")
        time.sleep(0.05)

    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    process.wait()
    time.sleep(AFTER_KILL_S)
    return killed_at


def measure_kill(args: argparse.Namespace, domain: int) -> dict[str, Any]:
    """Kill a controller once; return when damping arrived, and what the robot received."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        with ros_peer(args.python, domain, PEER_HZ, str(log)) as counts:
            killed_at = run_and_kill(args.policy, domain, args.seconds, log)
        commands = [json.loads(line) for line in log.read_text().splitlines()]
    dampings_at = [command["at"] for command in commands if command["at"] > killed_at]
    targets = np.array([command["data"] for command in commands])
    steps_rad = np.abs(np.diff(targets, axis=0)).max(axis=1)
    return {
        "damped_ms": round(1e3 * (dampings_at[0] - killed_at), 1) if dampings_at else None,
        "commands": len(commands) - len(dampings_at),
        "dampings": len(dampings_at),
        "largest_step_rad": round(float(steps_rad.max()), 3),
        "refused": counts[0]["not_finite"] + counts[0]["wrong_length"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="policy folder of a quadruped")
    parser.add_argument("--times", type=int, default=5, help="number of kills")
    parser.add_argument("--seconds", type=float, default=3.0, help="of commands before the kill")
    parser.add_argument(
        "--python", default=str(PEER_PYTHON), help="one that has rclpy (scripts/ros_peer.sh)"
    )
    args = parser.parse_args()

    control_hz = OnnxPolicy.load(args.policy).meta.control_hz
    _, after_command_s = damping_bounds_s(1 / control_hz)
    promised_ms = 1e3 * after_command_s
    first_domain = os.getpid() % 150 + 1
    runs = [measure_kill(args, first_domain + i) for i in range(args.times)]
    print(json.dumps({"promised_ms": promised_ms, "runs": runs}, indent=1))

    for run in runs:
        if run["damped_ms"] is None or run["damped_ms"] > promised_ms or run["refused"]:
            sys.exit(1)


if __name__ == "__main__":
    main()
