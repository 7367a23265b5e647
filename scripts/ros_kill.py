"""What a robot on ROS 2 hears when its controller is killed with -9: a policy on the peer of
scripts/ros_loop.py.

metarobot export QuadrupedFlat-rl2 --out runs/policy
python scripts/ros_kill.py runs/policy --times 5

The time is from the kill to the first command from the guard, by the clock of the rclpy node that
hears it.
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
from ros_loop import PYTHON, peer

from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.safety.command_gate import damping_bounds_s


def killed(policy: str, domain: int, seconds: float, log: Path) -> float:
    """Run a policy, kill its controller; return when, by the machine's monotonic clock."""
    command = [sys.executable, "-m", "metarobot.bridge", policy, "--robot", "ros2", "--plain"]
    process = subprocess.Popen(
        [*command, "--set", f"domain={domain}", "timeout=60"], stdin=subprocess.DEVNULL
    )
    begun = time.monotonic()
    while not log.exists() or not log.stat().st_size:
        if process.poll() is not None or time.monotonic() - begun > 120:
            sys.exit("the controller sent nothing")
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    at = time.monotonic()
    process.wait()
    time.sleep(2.0)
    return at


def one(args: argparse.Namespace, domain: int) -> dict[str, Any]:
    """One kill: how long until the robot heard of it, and what it heard."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        with peer(args.python, domain, 200.0, str(log)) as told:
            at = killed(args.policy, domain, args.seconds, log)
        heard = [json.loads(line) for line in log.read_text().splitlines()]
    after = [command["at"] - at for command in heard if command["at"] > at]
    steps = np.abs(np.diff([command["data"] for command in heard], axis=0)).max(axis=1)
    return {
        "damped_ms": round(1e3 * after[0], 1) if after else None,
        "commands": len(heard) - len(after),
        "dampings": len(after),
        "largest_step_rad": round(float(steps.max()), 3),
        "refused": told[0]["not_finite"] + told[0]["wrong_length"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", help="policy folder of a quadruped")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of commands before the kill")
    parser.add_argument(
        "--python", default=str(PYTHON), help="one that has rclpy (scripts/ros_peer.sh)"
    )
    args = parser.parse_args()
    promised = 1e3 * damping_bounds_s(1 / OnnxPolicy.load(args.policy).meta.control_hz)[1]
    runs = [one(args, os.getpid() % 150 + 1 + i) for i in range(args.times)]
    print(json.dumps({"promised_ms": promised, "runs": runs}, indent=1))
    sys.exit(any(r["damped_ms"] is None or r["damped_ms"] > promised or r["refused"] for r in runs))


if __name__ == "__main__":
    main()
