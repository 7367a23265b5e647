"""A robot on a real ROS 2, for scripts/ros_loop.py: MuJoCo behind forward_command_controller's
rules. Needs rclpy.

Publishes /joint_states (names with _joint, in an order of its own), /imu/data and /foot_forces at a
fixed rate, and holds the last command for ever, as ros2_control does: a message with a number that
is not finite is dropped, one of the wrong length puts the controller out of action. What came in is
sent back at once on /<controller>/echo. Ends on SIGTERM or SIGINT, and then prints what it counted
as JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")

import mujoco
import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_system_default
from sensor_msgs.msg import Imu, JointState
from std_msgs.msg import Float64MultiArray


class Robot:
    """Position drives in MuJoCo: torque = bias + gain · ctrl, so a target angle is a ctrl."""

    def __init__(self, path: str) -> None:
        self.model = mujoco.MjModel.from_xml_path(path)
        self.data = mujoco.MjData(self.model)
        self.joints = [
            self.model.joint(self.model.actuator(i).trnid[0]).name for i in range(self.model.nu)
        ]
        self._qpos = [self.model.joint(name).qposadr[0] for name in self.joints]
        self._dof = [self.model.joint(name).dofadr[0] for name in self.joints]
        touch = [
            i
            for i in range(self.model.nsensor)
            if self.model.sensor_type[i] == mujoco.mjtSensor.mjSENS_TOUCH
        ]
        self._touch = [self.model.sensor_adr[i] for i in touch]
        if self.model.nkey:
            mujoco.mj_resetDataKeyframe(self.model, self.data, 0)
        mujoco.mj_forward(self.model, self.data)

    def step(self, targets: np.ndarray, seconds: float) -> None:
        stiffness, gain = -self.model.actuator_biasprm[:, 1], self.model.actuator_gainprm[:, 0]
        self.data.ctrl[:] = (stiffness * targets - self.model.actuator_biasprm[:, 0]) / gain
        for _ in range(max(1, round(seconds / self.model.opt.timestep))):
            mujoco.mj_step(self.model, self.data)

    def angles(self) -> np.ndarray:
        return self.data.qpos[self._qpos]

    def speeds(self) -> np.ndarray:
        return self.data.qvel[self._dof]

    def forces(self) -> list[float]:
        return self.data.sensordata[self._touch].tolist()


class Peer(Node):
    """forward_command_controller, joint_state_broadcaster and imu_sensor_broadcaster in one
    node."""

    def __init__(self, robot: Robot, controller: str, rate: float, seed: int, log: str) -> None:
        super().__init__("robot")
        self.robot, self.period = robot, 1 / rate
        self.targets = robot.angles().copy()
        self.order = random.Random(seed).sample(range(len(robot.joints)), len(robot.joints))
        self.active = True
        self.count = {
            "states": 0,
            "commands": 0,
            "not_finite": 0,
            "wrong_length": 0,
            "late_ms": 0.0,
            "jump_rad": 0.0,
        }
        self.log = Path(log).open("w") if log else None  # noqa: SIM115
        self.states = self.create_publisher(JointState, "/joint_states", qos_profile_system_default)
        self.imu = self.create_publisher(Imu, "/imu/data", qos_profile_system_default)
        self.feet = self.create_publisher(
            Float64MultiArray, "/foot_forces", qos_profile_system_default
        )
        self.echo = self.create_publisher(
            Float64MultiArray, f"/{controller}/echo", qos_profile_system_default
        )
        # a queue, for this callback shares its thread with MuJoCo, and ros2_control's does not
        deep = QoSProfile(depth=100, reliability=ReliabilityPolicy.SYSTEM_DEFAULT)
        self.create_subscription(Float64MultiArray, f"/{controller}/commands", self.command, deep)
        self.due = time.monotonic()
        self.create_timer(self.period, self.tick)

    def command(self, message: Float64MultiArray) -> None:
        self.echo.publish(message)
        self.count["commands"] += 1
        values = np.asarray(message.data, float)
        if self.log:
            self.log.write(json.dumps({"at": time.monotonic(), "data": list(message.data)}) + "\n")
            self.log.flush()
        if not np.isfinite(values).all():
            self.count["not_finite"] += 1
        elif len(values) != len(self.targets):
            self.count["wrong_length"] += 1
            self.active = False
        elif self.active:
            self.count["jump_rad"] = max(
                self.count["jump_rad"], float(np.abs(values - self.targets).max())
            )
            self.targets = values

    def tick(self) -> None:
        self.count["late_ms"] = max(self.count["late_ms"], (time.monotonic() - self.due) * 1e3)
        self.due = time.monotonic() + self.period
        self.robot.step(self.targets, self.period)
        self.count["states"] += 1
        now = self.get_clock().now().to_msg()
        self.publish_joints(now)
        self.publish_imu(now)
        self.feet.publish(Float64MultiArray(data=self.robot.forces()))

    def publish_joints(self, now: Time) -> None:
        message = JointState()
        # numbered, so that what is lost can be counted
        message.header.stamp, message.header.frame_id = now, str(self.count["states"])
        message.name = [self.robot.joints[i] for i in self.order]
        message.position = self.robot.angles()[self.order].tolist()
        message.velocity = self.robot.speeds()[self.order].tolist()
        message.effort = self.robot.data.actuator_force[self.order].tolist()
        self.states.publish(message)

    def publish_imu(self, now: Time) -> None:
        message, data = Imu(), self.robot.data
        message.header.stamp = now
        q, w = message.orientation, message.angular_velocity
        q.w, q.x, q.y, q.z = map(float, data.qpos[3:7])
        w.x, w.y, w.z = map(float, data.qvel[3:6])
        self.imu.publish(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="MJCF of a robot on a free joint, with affine position actuators"
    )
    parser.add_argument("--controller", default="forward_position_controller")
    parser.add_argument("--hz", type=float, default=200.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of the joints in joint states"
    )
    parser.add_argument(
        "--log", default="", help="file for every command that came in, with its monotonic time"
    )
    args = parser.parse_args()
    rclpy.init()
    peer = Peer(Robot(args.model), args.controller, args.hz, args.seed, args.log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    executor = SingleThreadedExecutor()
    executor.add_node(peer)
    print("ready", flush=True)
    try:
        executor.spin()
    finally:
        height = float(peer.robot.data.qpos[2])
        print(json.dumps(peer.count | {"active": peer.active, "height_m": height}), flush=True)


if __name__ == "__main__":
    main()
