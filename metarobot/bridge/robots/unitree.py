"""Unitree's Go2 by its low-level messages, over DDS and without Unitree's SDK.

Read is ``rt/lowstate``; a message with a wrong checksum is dropped and counted. Written is
``rt/lowcmd``, with target angle and gains of each motor. The robot's own walking service publishes
the same commands, so it must have been stopped, in the app or by the SDK's motion switcher;
``connect`` refuses while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import GYRO, QUAT, Command
from metarobot.bridge.robots.dds_robot import DdsRobot
from metarobot.bridge.robots.joint_bounds import JointBounds
from metarobot.bridge.robots.unitree_health import MAX_MOTOR_C, MIN_CHARGE, Go2Health
from metarobot.bridge.safety.command_checks import validated_command

if TYPE_CHECKING:
    from metarobot.bridge.policy.metadata import PolicyMetadata
    from metarobot.bridge.robots.dds import DdsConnection
    from metarobot.bridge.robots.unitree_messages import LowCmd, LowState

LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{part}" for leg in LEGS for part in ("hip", "thigh", "calf"))
"""The motors, in the order of the messages."""

# Ranges, speeds and torques of Unitree's description of the Go2:
# https://github.com/unitreerobotics/unitree_ros, robots/go2_description. Gains: several times those
# that walking policies use, 20 to 40 N·m/rad and 0.5 to 1 N·m·s/rad.
_MAX_STIFFNESS = 100.0
_MAX_DAMPING = 10.0
_HIP_BOUNDS = JointBounds(-1.0472, 1.0472, 30.1, 23.7, _MAX_STIFFNESS, _MAX_DAMPING)
_FRONT_THIGH_BOUNDS = JointBounds(-1.5708, 3.4907, 30.1, 23.7, _MAX_STIFFNESS, _MAX_DAMPING)
_REAR_THIGH_BOUNDS = JointBounds(-0.5236, 4.5379, 30.1, 23.7, _MAX_STIFFNESS, _MAX_DAMPING)
_CALF_BOUNDS = JointBounds(-2.7227, -0.83776, 15.7, 45.43, _MAX_STIFFNESS, _MAX_DAMPING)
GO2_BOUNDS = {
    f"{leg}_{part}": bounds
    for leg in LEGS
    for part, bounds in (
        ("hip", _HIP_BOUNDS),
        ("thigh", _FRONT_THIGH_BOUNDS if leg.startswith("F") else _REAR_THIGH_BOUNDS),
        ("calf", _CALF_BOUNDS),
    )
}
"""Joint -> what a policy may ask of it at most; a policy that asks for more is refused."""

POS_STOP = 2.146e9
"""Target angle that means: do not control the position (``PosStopF`` of the SDK)."""
VEL_STOP = 16000.0
"""Target speed that means: do not control the speed (``VelStopF`` of the SDK)."""

# numbers of a LowCmd before its motors: head (two), level flag for low-level control; then frame,
# serial number, version and bandwidth
_COMMAND_HEAD = [0xFE, 0xEF, 0xFF, 0, 0, 0, 0, 0, 0]
# numbers after its motors: battery, remote, lamps, fans, gpio, reserve, checksum
_COMMAND_TAIL = [0] * 61
_SERVO_MODE = 1
"""A motor's mode."""
# mode, angle, speed, torque, kp, kd, and three reserved words
_IDLE_MOTOR = [_SERVO_MODE, POS_STOP, VEL_STOP, 0.0, 0.0, 0.0, 0, 0, 0]
_UNUSED_MOTORS = 8
"""Motors of the message that a Go2 lacks."""

# a LowState's numbers: how many its head, its IMU and each motor have
_HEAD_NUMBERS = 9
_IMU_NUMBERS = 14
_MOTOR_NUMBERS = 12
# and where the feet's forces and the tick are
_FEET_INDEX = 288
_TICK_INDEX = 296
_TICK_S = 1e-3

_STATES_TOPIC = "rt/lowstate"
_COMMANDS_TOPIC = "rt/lowcmd"
_POSITION_KEYS = [f"{joint}.pos" for joint in JOINTS]


class UnitreeRobot(DdsRobot["LowState", "LowCmd"]):
    """A Go2, whose motors are position drives with the policy's gains.

    Args:
        meta: The policy's metadata.
        interface: Network interface on the robot's net; its computers are 192.168.123.x.
        domain: DDS domain.
        damping: Velocity gain of each motor after ``damp``, N·m·s/rad.
        foot_zero: What a foot's sensor reads in the air; it has no unit.
        foot_scale: Force for a unit more of it, N.
        checksums: Whether readings must have a right checksum; some simulators send none.
        max_motor_c: Hottest motor with which the robot is driven, °C.
        min_charge: Lowest charge of the battery with which it is driven, %.
        timeout: How long ``connect`` waits for each thing it needs, s.
        guard: Whether this is the guard process beside a controller.

    Raises:
        BridgeError: The policy's joints are not a Go2's.
    """

    name = "unitree"
    joint_bounds = GO2_BOUNDS

    def __init__(
        self,
        meta: PolicyMetadata,
        *,
        interface: str = "lo",
        domain: int = 0,
        damping: float = 4.0,
        foot_zero: float = 0.0,
        foot_scale: float = 1.0,
        checksums: bool = True,
        max_motor_c: float = MAX_MOTOR_C,
        min_charge: float = MIN_CHARGE,
        timeout: float = 5.0,
        guard: bool = False,
    ) -> None:
        if sorted(meta.joint_names) != sorted(JOINTS):
            raise BridgeError(
                f"a policy for the joints {', '.join(meta.joint_names)}; "
                f"a Go2 has {', '.join(JOINTS)}"
            )
        super().__init__(interface, domain, timeout)
        self.identity = f"unitree go2 on {interface}, domain {domain}"
        self.bad = 0
        """Readings dropped for a wrong checksum."""

        # the policy's gains in the order of the motors
        stiffness = dict(zip(meta.joint_names, meta.joint_stiffness, strict=True))
        joint_damping = dict(zip(meta.joint_names, meta.joint_damping, strict=True))
        self._gains = [(stiffness[joint], joint_damping[joint]) for joint in JOINTS]
        self._damping = damping
        self._foot_zero = foot_zero
        self._foot_scale = foot_scale
        self._checksums = checksums
        for name, value in (("max_motor_c", max_motor_c), ("min_charge", min_charge)):
            if not 0 <= value <= 200:
                raise BridgeError(f"{name} must be between 0 and 200, not {value}")
        self._max_motor_c = max_motor_c
        self._min_charge = min_charge
        self._guard = guard

    def _open(self) -> DdsConnection[LowState, LowCmd]:
        from metarobot.bridge.robots import dds, unitree_messages

        self._latest: dict[str, float] = {}
        self._health = Go2Health(JOINTS, self._max_motor_c, self._min_charge)
        return dds.DdsConnection(
            dds.DdsParticipant(self._interface, self._domain),
            states=(_STATES_TOPIC, unitree_messages.LowState),
            commands=(_COMMANDS_TOPIC, unitree_messages.LowCmd),
            guard=self._guard,
        )

    def _await_readings(self, connection: DdsConnection[LowState, LowCmd]) -> None:
        connection.participant.wait(
            lambda: bool(self._receive()), self._timeout, self._describe_silence
        )

    def _describe_silence(self) -> str:
        if self.bad:
            return f"{self.bad} readings with a wrong checksum and no valid one"
        return f"nothing on {_STATES_TOPIC}"

    def get_observation(self) -> dict[str, float]:
        """Return the newest valid reading; ``stamp`` is the robot's tick, s, ``seq`` in ms.

        Raises:
            OperatorStopError: The remote's damping combination, L2+B, is pressed.
            BridgeError: The link is lost, or the robot reports a fault of its own
                (``metarobot.bridge.robots.unitree_health``).
        """
        self._connected().check()
        return dict(self._receive())

    def send_action(self, action: Command) -> dict[str, float]:
        """Send the joints' targets, rad, with their gains; after ``damp``, nothing is sent."""
        targets = validated_command(action, _POSITION_KEYS)
        motors = [
            (_SERVO_MODE, target, 0.0, 0.0, kp, kd, 0, 0, 0)
            for target, (kp, kd) in zip(targets, self._gains, strict=True)
        ]
        sent = self._connected().send(_make_command(motors))
        return dict(action) if sent else {}

    def damp(self) -> None:
        """Make every motor brake and hold no position; motors keep the last command they got."""
        if self._connection is not None:
            braking = [_SERVO_MODE, POS_STOP, 0.0, 0.0, 0.0, self._damping, 0, 0, 0]
            self._connection.damp(_make_command([braking] * len(JOINTS)))

    def _receive(self) -> dict[str, float]:
        """Read what is new; return the newest valid reading."""
        state = self._connected().newest()
        if state is None:
            return self._latest

        if self._checksums:
            is_right = state.is_valid
            self.bad += not is_right
            # Before the first valid reading it is ``connect`` that says what is wrong
            if self._latest:
                self._health.note_checksum(is_right)
            if not is_right:
                return self._latest
        self._health.check(state.numbers)
        self._latest = _make_reading(state.numbers, self._foot_zero, self._foot_scale)
        return self._latest


def _make_reading(
    numbers: Sequence[float], foot_zero: float, foot_scale: float
) -> dict[str, float]:
    """Return the reading in a LowState's numbers."""
    tick = numbers[_TICK_INDEX]
    reading = {"stamp": tick * _TICK_S, "seq": tick}

    # the IMU begins with its quaternion and gyroscope
    imu_keys = (*QUAT, *GYRO)
    imu = numbers[_HEAD_NUMBERS : _HEAD_NUMBERS + len(imu_keys)]
    reading.update(zip(imu_keys, imu, strict=True))

    for i, joint in enumerate(JOINTS):
        start = _HEAD_NUMBERS + _IMU_NUMBERS + i * _MOTOR_NUMBERS
        _mode, angle, speed, _acceleration, torque = numbers[start : start + 5]
        reading[f"{joint}.pos"] = angle
        reading[f"{joint}.vel"] = speed
        reading[f"{joint}.tau"] = torque

    for i, leg in enumerate(LEGS):
        reading[f"{leg}.force"] = foot_scale * (numbers[_FEET_INDEX + i] - foot_zero)
    return reading


def _make_command(motors: Sequence[Sequence[float]]) -> LowCmd:
    """Return the message that commands twelve motors; those that a Go2 lacks stay idle."""
    from metarobot.bridge.robots.unitree_messages import LowCmd

    all_motors = [*motors, *[_IDLE_MOTOR] * _UNUSED_MOTORS]
    motor_numbers = [number for motor in all_motors for number in motor]
    return LowCmd([*_COMMAND_HEAD, *motor_numbers, *_COMMAND_TAIL])
