"""A robot on a real ROS 2: MuJoCo behind the rules of forward_command_controller.

This is the peer of scripts/ros_loop.py, and needs rclpy. It publishes /joint_states (names with
_joint, in an order of its own), /imu/data and /foot_forces at a fixed rate, and holds the last
command for ever, as ros2_control does: a message with a number that is not finite is dropped, one
of the wrong length deactivates the controller. Every command is sent back at once on
/<controller>/echo. The process ends on SIGTERM or SIGINT, and then prints its counts as JSON.
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


class SimulatedRobot:
    """A robot with affine position actuators, torque = bias + gain · ctrl, in MuJoCo."""

    def __init__(self, path: str) -> None:
        self.model = mujoco.MjModel.from_xml_path(path)
        self.data = mujoco.MjData(self.model)
        actuators = range(self.model.nu)
        self.joints = [self.model.joint(self.model.actuator(i).trnid[0]).name for i in actuators]
        self._qpos = [self.model.joint(name).qposadr[0] for name in self.joints]
        self._dof = [self.model.joint(name).dofadr[0] for name in self.joints]
        self._touch = [
            self.model.sensor_adr[i]
            for i in range(self.model.nsensor)
            if self.model.sensor_type[i] == mujoco.mjtSensor.mjSENS_TOUCH
        ]
        if self.model.nkey:
            mujoco.mj_resetDataKeyframe(self.model, self.data, 0)
        mujoco.mj_forward(self.model, self.data)

    def step(self, targets: np.ndarray, seconds: float) -> None:
        """Simulate with target angles, rad."""
        # torque = b0 + b1 q + gain ctrl = kp (target − q) + ...  with  kp = −b1
        stiffness = -self.model.actuator_biasprm[:, 1]
        gain = self.model.actuator_gainprm[:, 0]
        self.data.ctrl[:] = (stiffness * targets - self.model.actuator_biasprm[:, 0]) / gain
        for _ in range(max(1, round(seconds / self.model.opt.timestep))):
            mujoco.mj_step(self.model, self.data)

    def angles(self) -> np.ndarray:
        """Return joint angles, rad."""
        return self.data.qpos[self._qpos]

    def velocities(self) -> np.ndarray:
        """Return joint velocities, rad/s."""
        return self.data.qvel[self._dof]

    def foot_forces(self) -> list[float]:
        """Return the readings of touch sensors, N."""
        return self.data.sensordata[self._touch].tolist()


class RosPeer(Node):
    """Like forward_command_controller, joint_state_ and imu_sensor_broadcaster in one node."""

    def __init__(
        self, robot: SimulatedRobot, controller: str, rate_hz: float, seed: int, log: str
    ) -> None:
        super().__init__("robot")
        self.robot = robot
        self.period_s = 1 / rate_hz
        self.targets = robot.angles().copy()
        joints = range(len(robot.joints))
        self.joint_order = random.Random(seed).sample(joints, len(joints))
        self.active = True
        self.counts = {
            "states": 0,
            "commands": 0,
            "not_finite": 0,
            "wrong_length": 0,
            "late_ms": 0.0,
            "jump_rad": 0.0,
        }
        self.log = Path(log).open("w") if log else None  # noqa: SIM115

        qos = qos_profile_system_default
        self.states = self.create_publisher(JointState, "/joint_states", qos)
        self.imu = self.create_publisher(Imu, "/imu/data", qos)
        self.feet = self.create_publisher(Float64MultiArray, "/foot_forces", qos)
        self.echo = self.create_publisher(Float64MultiArray, f"/{controller}/echo", qos)
        # A queue, because this callback shares its thread with MuJoCo, as ros2_control's does not
        deep = QoSProfile(depth=100, reliability=ReliabilityPolicy.SYSTEM_DEFAULT)
        self.create_subscription(
            Float64MultiArray, f"/{controller}/commands", self.on_command, deep
        )
        self.due = time.monotonic()
        self.create_timer(self.period_s, self.on_timer)

    def on_command(self, message: Float64MultiArray) -> None:
        """Follow a command by forward_command_controller's rules."""
        self.echo.publish(message)
        self.counts["commands"] += 1
        targets = np.asarray(message.data, float)
        if self.log:
            line = json.dumps({"at": time.monotonic(), "data": list(message.data)})
            self.log.write(line + "\n")
            self.log.flush()

        if not np.isfinite(targets).all():
            self.counts["not_finite"] += 1
        elif len(targets) != len(self.targets):
            self.counts["wrong_length"] += 1
            self.active = False
        elif self.active:
            jump_rad = float(np.abs(targets - self.targets).max())
            self.counts["jump_rad"] = max(self.counts["jump_rad"], jump_rad)
            self.targets = targets

    def on_timer(self) -> None:
        """Simulate one period and publish."""
        late_ms = 1e3 * (time.monotonic() - self.due)
        self.counts["late_ms"] = max(self.counts["late_ms"], late_ms)
        self.due = time.monotonic() + self.period_s
        self.robot.step(self.targets, self.period_s)
        self.counts["states"] += 1
        now = self.get_clock().now().to_msg()
        self.publish_joints(now)
        self.publish_imu(now)
        self.feet.publish(Float64MultiArray(data=self.robot.foot_forces()))

    def publish_joints(self, now: Time) -> None:
        """Publish joint states in this node's own order."""
        message = JointState()
        message.header.stamp = now
        # Numbered, so that lost ones can be counted
        message.header.frame_id = str(self.counts["states"])
        order = self.joint_order
        message.name = [self.robot.joints[i] for i in order]
        message.position = self.robot.angles()[order].tolist()
        message.velocity = self.robot.velocities()[order].tolist()
        message.effort = self.robot.data.actuator_force[order].tolist()
        self.states.publish(message)

    def publish_imu(self, now: Time) -> None:
        """Publish the trunk's orientation and angular velocity."""
        qpos = self.robot.data.qpos
        qvel = self.robot.data.qvel
        message = Imu()
        message.header.stamp = now
        orientation = message.orientation
        orientation.w, orientation.x, orientation.y, orientation.z = map(float, qpos[3:7])
        velocity = message.angular_velocity
        velocity.x, velocity.y, velocity.z = map(float, qvel[3:6])
        self.imu.publish(message)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    robot = SimulatedRobot(args.model)
    peer = RosPeer(robot, args.controller, args.hz, args.seed, args.log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    executor = SingleThreadedExecutor()
    executor.add_node(peer)
    print("ready", flush=True)
    try:
        executor.spin()
    finally:
        height_m = float(robot.data.qpos[2])
        report = peer.counts | {"active": peer.active, "height_m": height_m}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
