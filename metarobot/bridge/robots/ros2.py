"""A robot behind ROS 2's forward_command_controller, over DDS and without a ROS installation.

Read are ``/joint_states``, whose joints are matched by name, and for robots with legs ``/imu/data``
and the feet's forces. Written are the joints' target angles, on ``/<controller>/commands``. Where
somebody publishes ``/diagnostics`` or ``/controller_manager/activity``, a fault there ends the run.

That controller drops a message with a number that is not finite, is deactivated by one of the wrong
length, and holds the last one for ever. So neither of these is sent, and somebody must send a last
command when commands end: the guard process does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import GYRO, QUAT, Command
from metarobot.bridge.robots.dds_robot import DdsRobot
from metarobot.bridge.safety.command_checks import may_be_held, validated_command

if TYPE_CHECKING:
    from metarobot.bridge.policy.metadata import PolicyMetadata
    from metarobot.bridge.robots.dds import DdsConnection
    from metarobot.bridge.robots.ros2_messages import (
        ControllerManagerActivity,
        DiagnosticArray,
        Float64,
        Float64MultiArray,
        Header,
        Imu,
        JointState,
    )


BAD_LEVELS = {2: "an error", 3: "a component that is silent"}
"""Level of a DiagnosticStatus that ends a run -> its meaning; a warning does not."""
ACTIVE_STATE = 3
"""Number of the lifecycle state ``active``."""
DIAGNOSTICS_KEPT = 32
"""Diagnoses that wait to be read, one in each control step: several nodes publish at once."""
LONGEST_TEXT = 80
"""Characters of the robot's own words that are passed on."""


class Ros2Robot(DdsRobot["JointState", "Float64MultiArray"]):
    """A robot on ROS 2 with position drives.

    There is no damping behind position drives. ``damp`` commands each joint to its measured angle:
    called repeatedly, the robot yields and sinks; called once, it yields as far as its drives do
    under their load, and stays there, stiff.

    Args:
        meta: The policy's metadata.
        interface: Network interface.
        domain: ROS_DOMAIN_ID.
        controller: Name of the forward_command_controller, on the interface ``position``.
        joints: Its parameter ``joints``, by the policy's names and separated by commas; the
            policy's own order if empty. ROS may call joint ``x`` ``x_joint``.
        states: Topic of the joint states.
        imu: Topic of the IMU, read for a legged policy.
        feet: Topic of the feet's forces, N, a std_msgs/Float64MultiArray in the policy's order of
            legs; read if the policy's reward needs it.
        reward: Topic of the reward, a std_msgs/Float64; read if given.
        diagnostics: Topic of a diagnostic_msgs/DiagnosticArray, heard if anybody publishes it; a
            status of level ERROR or STALE ends the run. Empty: not heard.
        ignore: Beginnings of names of statuses that do not end the run, separated by commas.
        activity: Topic of ros2_control's ControllerManagerActivity, heard if anybody publishes it;
            the run ends when ``controller`` or a hardware component is not active any more. Empty:
            not heard.
        timeout: How long ``connect`` waits for each thing it needs, s.
        guard: Whether this is the guard process beside a controller.

    Raises:
        BridgeError: ``joints`` are not those of the policy.
    """

    name = "ros2"

    def __init__(
        self,
        meta: PolicyMetadata,
        *,
        interface: str = "lo",
        domain: int = 0,
        controller: str = "forward_position_controller",
        joints: str = "",
        states: str = "joint_states",
        imu: str = "imu/data",
        feet: str = "foot_forces",
        reward: str = "",
        diagnostics: str = "diagnostics",
        ignore: str = "",
        activity: str = "controller_manager/activity",
        timeout: float = 5.0,
        guard: bool = False,
    ) -> None:
        super().__init__(interface, domain, timeout)
        self.identity = f"ros2 {controller} on {interface}, domain {domain}"
        self._guard = guard
        self._joints = tuple(joints.split(",")) if joints else tuple(meta.joint_names)
        if sorted(self._joints) != sorted(meta.joint_names):
            policy_joints = ", ".join(meta.joint_names) or "none"
            robot_joints = ", ".join(self._joints) or "none"
            raise BridgeError(
                f"the policy's joints {policy_joints} are not {controller}'s: {robot_joints}"
            )

        self._limits = meta.limits

        # keys of a reading
        self._position_keys = [f"{joint}.pos" for joint in self._joints]
        self._velocity_keys = [f"{joint}.vel" for joint in self._joints]
        self._torque_keys = [f"{joint}.tau" for joint in self._joints]
        self._force_keys = [f"{leg}.force" for leg in (meta.reward or {}).get("legs", ())]

        # topics, empty where none is read; DDS names of ROS 2 topics begin with rt/
        self._commands_topic = f"rt/{controller}/commands"
        self._states_topic = f"rt/{states}"
        self._imu_topic = f"rt/{imu}" if meta.layout == "legged" else ""
        self._feet_topic = f"rt/{feet}" if self._force_keys else ""
        self._reward_topic = f"rt/{reward}" if reward else ""
        self._diagnostics_topic = f"rt/{diagnostics}" if diagnostics else ""
        self._activity_topic = f"rt/{activity}" if activity else ""
        self._controller = controller
        self._ignored = tuple(name for name in ignore.split(",") if name)

    def _open(self) -> DdsConnection[JointState, Float64MultiArray]:
        from metarobot.bridge.robots import dds, ros2_messages

        participant = dds.DdsParticipant(self._interface, self._domain)
        connection = dds.DdsConnection(
            participant,
            states=(self._states_topic, ros2_messages.JointState),
            commands=(self._commands_topic, ros2_messages.Float64MultiArray),
            guard=self._guard,
        )

        # topic -> (its newest message, what a message contributes to the reading)
        self._sources: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, float]]]] = {}
        self._sources[self._states_topic] = (connection.newest, self._read_joints)
        if self._imu_topic:
            imu = participant.reader(self._imu_topic, ros2_messages.Imu)
            self._sources[self._imu_topic] = (imu.newest, _read_imu)
        if self._feet_topic:
            feet = participant.reader(self._feet_topic, ros2_messages.Float64MultiArray)
            self._sources[self._feet_topic] = (feet.newest, self._read_feet)
        if self._reward_topic:
            reward = participant.reader(self._reward_topic, ros2_messages.Float64)
            self._sources[self._reward_topic] = (reward.newest, _read_reward)

        # What the robot says of itself; the guard process damps whatever it says
        self._reports: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        if self._diagnostics_topic and not self._guard:
            diagnoses = participant.reader(
                self._diagnostics_topic, ros2_messages.DiagnosticArray, depth=DIAGNOSTICS_KEPT
            )
            self._reports.append((diagnoses.newest, self._check_diagnosis))
        if self._activity_topic and not self._guard:
            activities = participant.reader(
                self._activity_topic, ros2_messages.ControllerManagerActivity, latched=True
            )
            self._reports.append((activities.newest, self._check_activity))
        self._were_active: set[str] = set()

        self._parts: dict[str, dict[str, float]] = {}
        """Topic -> its newest contribution to the reading."""
        self._ros_joint_names: Sequence[str] = ()
        self._measured_positions: list[float] = []
        """The last joint angles at which the robot may be held, rad."""
        self._seq = 0
        return connection

    def _await_readings(self, connection: DdsConnection[JointState, Float64MultiArray]) -> None:
        awaited = {self._states_topic, self._imu_topic, self._feet_topic} - {""}
        connection.participant.wait(
            lambda: awaited <= self._receive().keys(),
            self._timeout,
            lambda: f"nothing on {', '.join(sorted(awaited - self._parts.keys()))}",
        )
        if not self._measured_positions:
            raise BridgeError(
                f"the joints' positions on {self._states_topic} are not finite, or out of range"
            )

    def get_observation(self) -> dict[str, float]:
        """Return the newest readings of all topics.

        ``stamp`` is the older one of joints and IMU, so that neither can stop unnoticed.

        Raises:
            BridgeError: The link is lost, or the robot reports a fault of its own.
        """
        self._connected().check()
        for newest, check in self._reports:
            if (report := newest()) is not None:
                check(report)
        parts = self._receive().values()
        reading = {key: value for part in parts for key, value in part.items()}
        reading["stamp"] = min(part["stamp"] for part in parts if "stamp" in part)
        reading["seq"] = self._seq
        return reading

    def send_action(self, action: Command) -> dict[str, float]:
        """Publish the joints' targets, rad; after ``damp``, send nothing and return nothing."""
        targets = validated_command(action, self._position_keys)
        sent = self._connected().send(_make_array_message(targets))
        return dict(action) if sent else {}

    def damp(self) -> None:
        """Command every joint to the angle at which it was measured last."""
        connection = self._connection
        if connection is None:
            return
        # Whatever is wrong with what comes in, the last good angles are commanded
        with suppress(Exception):
            self._receive()
        # an empty command, before the first reading, would deactivate the controller
        if self._measured_positions:
            connection.damp(_make_array_message(self._measured_positions))

    def _receive(self) -> dict[str, dict[str, float]]:
        """Read what is new; return topic -> newest contribution to the reading."""
        for topic, (newest, read) in self._sources.items():
            if (message := newest()) is not None:
                self._parts[topic] = read(message)
        return self._parts

    def _read_joints(self, message: JointState) -> dict[str, float]:
        if message.name != self._ros_joint_names:
            self._joint_order = _find_joints(self._joints, message.name)
            self._ros_joint_names = message.name

        reading = {"stamp": _to_seconds(message.header)}
        for keys, values in (
            (self._position_keys, message.position),
            (self._velocity_keys, message.velocity),
            (self._torque_keys, message.effort),
        ):
            # ROS leaves a list empty that is not measured
            if len(values) == 0:
                continue
            if len(values) != len(self._ros_joint_names):
                raise BridgeError(
                    f"{self._states_topic} has {len(values)} numbers "
                    f"for {len(self._ros_joint_names)} joints"
                )
            ordered = [values[i] for i in self._joint_order]
            reading.update(zip(keys, ordered, strict=True))

        positions = [reading.get(key, math.nan) for key in self._position_keys]
        if may_be_held(dict(zip(self._joints, positions, strict=True)), self._limits):
            self._measured_positions = positions
        self._seq += 1
        return reading

    def _read_feet(self, message: Float64MultiArray) -> dict[str, float]:
        if len(message.data) != len(self._force_keys):
            raise BridgeError(
                f"{self._feet_topic} has {len(message.data)} numbers "
                f"for {len(self._force_keys)} feet"
            )
        return dict(zip(self._force_keys, message.data, strict=True))

    def _check_diagnosis(self, message: DiagnosticArray) -> None:
        """Raise if a component has an error, or has not reported for too long."""
        for status in message.status:
            if status.level in BAD_LEVELS and not status.name.startswith(self._ignored):
                raise BridgeError(
                    f"{self._diagnostics_topic.removeprefix('rt/')} reports "
                    f"{BAD_LEVELS[status.level]}: {_one_line(status.name)}: "
                    f"{_one_line(status.message)}"
                )

    def _check_activity(self, message: ControllerManagerActivity) -> None:
        """Raise if the controller or a part of the hardware was active and is not any more."""
        parts = [part for part in message.controllers if part.name == self._controller]
        for part in [*parts, *message.hardware_components]:
            if part.state.id == ACTIVE_STATE:
                self._were_active.add(part.name)
            elif part.name in self._were_active:
                raise BridgeError(
                    f"{_one_line(part.name)} is not active any more: "
                    f"{_one_line(part.state.label) or part.state.id}"
                )


def _one_line(text: str) -> str:
    """Return a text of the robot's as a short line of printable characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST_TEXT]


def _find_joints(joints: Sequence[str], ros_names: Sequence[str]) -> list[int]:
    """Return the index of each joint among ROS's names, which may end in ``_joint``."""
    places = {name.removesuffix("_joint"): i for i, name in enumerate(ros_names)}
    # the exact name takes precedence
    places |= {name: i for i, name in enumerate(ros_names)}
    if missing := [joint for joint in joints if joint not in places]:
        raise BridgeError(
            f"no joint {', '.join(missing)} among the robot's: {', '.join(ros_names)}"
        )
    return [places[joint] for joint in joints]


def _read_imu(message: Imu) -> dict[str, float]:
    q = message.orientation
    gyro = message.angular_velocity
    numbers = (q.w, q.x, q.y, q.z, gyro.x, gyro.y, gyro.z)
    return {"stamp": _to_seconds(message.header), **dict(zip((*QUAT, *GYRO), numbers, strict=True))}


def _read_reward(message: Float64) -> dict[str, float]:
    return {"reward": message.data}


def _to_seconds(header: Header) -> float:
    return float(header.stamp.sec + header.stamp.nanosec * 1e-9)


def _make_array_message(numbers: list[float]) -> Float64MultiArray:
    from metarobot.bridge.robots.ros2_messages import Float64MultiArray, MultiArrayLayout

    return Float64MultiArray(MultiArrayLayout([], 0), numbers)
