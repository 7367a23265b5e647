"""Drive any robot of the LeRobot library, without importing LeRobot: by the methods of its robots.

LeRobot measures motors in degrees, or in percent of their calibrated range; a policy has joints in
rad. A table of ``MotorConversion`` translates. Subclass ``LeRobotAdapter`` for a robot of your own;
docs/robot.md has an example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Command
from metarobot.bridge.safety.command_checks import may_be_held, validated_command

if TYPE_CHECKING:
    from metarobot.bridge.policy.metadata import PolicyMetadata

MAX_MOTOR_C = 65.0
"""Hottest motor, °C: Feetech's servos switch themselves off at 70, Dynamixel's at 72 or 80."""
HEALTH_INTERVAL_S = 1.0
"""How often a register of ``HEALTH_REGISTERS`` is read; each read takes a few ms of the bus."""
TEMPERATURE_REGISTER = "Present_Temperature"
HEALTH_REGISTERS = (TEMPERATURE_REGISTER, "Hardware_Error_Status", "Status")
"""Registers that are read where a bus has them: the temperature, °C, and error bits, which are 0 on
a motor that is well (Dynamixel's and Feetech's)."""
DAMP_RETRY_S = 0.2
"""How long ``damp`` tries when another thread is using the robot's bus, s."""
RETRY_INTERVAL_S = 0.001

ResultT = TypeVar("ResultT")


class LeRobotLike(Protocol):
    """The part of ``lerobot.robots.Robot`` that is used."""

    name: str
    observation_features: Mapping[str, Any]
    action_features: Mapping[str, Any]
    is_calibrated: bool

    def connect(self, calibrate: bool = True) -> None:
        """Open the bus."""

    def get_observation(self) -> Mapping[str, Any]:
        """Read all motors."""

    def send_action(self, action: dict[str, Any]) -> Mapping[str, Any]:
        """Write the goals; return those really written."""

    def disconnect(self) -> None:
        """Close the bus."""


@runtime_checkable
class HasTorqueSwitch(Protocol):
    """A motor bus of LeRobot that can switch the motors' torque off."""

    def disable_torque(self) -> Any:
        """Switch the torque of all motors off."""


@runtime_checkable
class HasMotorBus(Protocol):
    """A LeRobot robot with a motor bus."""

    bus: Any


@runtime_checkable
class ReadsRegisters(Protocol):
    """A motor bus of LeRobot that can read a register of all motors."""

    def sync_read(self, data_name: str, *, normalize: bool) -> Mapping[str, Any]:
        """Return motor -> number in the register."""


@runtime_checkable
class HasId(Protocol):
    """A LeRobot robot that has been given a name of its own."""

    id: str | None


@dataclass(frozen=True)
class MotorConversion:
    """Conversion of a motor's number to a joint's angle: rad = zero + scale · number."""

    key: str
    """The motor's key in observations and actions, such as ``shoulder_pan.pos``."""
    scale: float
    """rad for a unit; negative if motor and joint turn in opposite directions."""
    zero: float = 0.0
    """Angle at the number 0, rad."""

    @classmethod
    def degrees(cls, key: str, sign: int = 1, zero: float = 0.0) -> Self:
        """Convert a motor measured in degrees (LeRobot's ``use_degrees``)."""
        return cls(key, sign * math.pi / 180, zero)

    @classmethod
    def ranged(
        cls, key: str, low: float, high: float, span: tuple[float, float] = (-100.0, 100.0)
    ) -> Self:
        """Convert a motor measured in percent of its range.

        Args:
            key: The motor's key.
            low: Angle at the lower end of ``span``, rad.
            high: Angle at its upper end, rad.
            span: Numbers at the ends of the range; a gripper's are (0, 100) in LeRobot.
        """
        scale = (high - low) / (span[1] - span[0])
        return cls(key, scale, low - scale * span[0])

    def to_rad(self, number: float) -> float:
        """Return the joint's angle, rad."""
        return self.zero + self.scale * number

    def to_number(self, angle: float) -> float:
        """Return the motor's number for an angle, rad."""
        return (angle - self.zero) / self.scale


class LeRobotAdapter:
    """A LeRobot robot, driven in rad by a policy's joint names.

    LeRobot measures no speeds and has no clock: speeds are differences of two readings, and a
    reading's stamp is the time when it came back. Reading takes as long as the bus does, a few ms
    for six servos. A second process cannot open the same port, so nothing damps the robot if this
    one is killed: its motors then hold their last goals.

    Args:
        robot: The LeRobot robot.
        meta: The policy's metadata.
        table: Joint -> conversion, for each joint of the policy; other motors are left alone.
        limp: Function that makes the robot limp; ``robot.bus.disable_torque`` if there is that.
            Without either, ``damp`` commands each motor to where it is, and it stays there, stiff.
        max_motor_c: Hottest motor with which the robot is driven, °C; read where the bus tells it.

    Raises:
        BridgeError: The table's joints are not the policy's, or the robot lacks a motor.
    """

    name = "lerobot"
    guarded = False

    def __init__(
        self,
        robot: LeRobotLike,
        meta: PolicyMetadata,
        table: Mapping[str, MotorConversion],
        limp: Callable[[], object] | None = None,
        max_motor_c: float = MAX_MOTOR_C,
    ) -> None:
        if table.keys() != set(meta.joint_names):
            policy_joints = ", ".join(meta.joint_names) or "none"
            table_joints = ", ".join(table) or "none"
            raise BridgeError(
                f"the policy's joints {policy_joints} are not the table's: {table_joints}"
            )
        motors = robot.observation_features.keys() & robot.action_features.keys()
        if unknown := [motor.key for motor in table.values() if motor.key not in motors]:
            raise BridgeError(
                f"{robot.name} has no motor {', '.join(unknown)}; "
                f"it has {', '.join(sorted(motors))}"
            )

        robot_id = (robot.id or "") if isinstance(robot, HasId) else ""
        self.identity = f"lerobot {robot.name} {robot_id}".rstrip()
        self._robot = robot
        self._motors = [table[joint] for joint in meta.joint_names]
        self._position_keys = [f"{joint}.pos" for joint in meta.joint_names]
        self._velocity_keys = [f"{joint}.vel" for joint in meta.joint_names]
        bus = robot.bus if isinstance(robot, HasMotorBus) else None
        if limp is None and isinstance(bus, HasTorqueSwitch):
            limp = bus.disable_torque
        self._limp = limp
        self._max_motor_c = max_motor_c
        self._registers = bus if isinstance(bus, ReadsRegisters) else None
        self._health_registers: list[str] = []
        self._joints = meta.joint_names
        self._limits = meta.limits
        self._connected = False
        self._damped = False

    def connect(self) -> None:
        """Open the robot and read it once.

        Raises:
            BridgeError: It does not open, or is not calibrated: calibrating would move it and ask
                questions.
        """
        _call(lambda: self._robot.connect(calibrate=False))
        self._connected = True
        self._damped = False
        self._angles = [math.nan] * len(self._motors)
        self._held_angles = self._angles
        """The last angles at which the robot may be held, rad; NaN is never sent."""
        self._stamp = 0.0
        self._seq = 0
        self._latest: dict[str, float] = {}
        if not self._robot.is_calibrated:
            self.disconnect()
            raise BridgeError(f"{self._robot.name} is not calibrated; run lerobot-calibrate first")
        self._find_health_registers()
        self.get_observation()

    def get_observation(self) -> dict[str, float]:
        """Read all motors now; speeds are 0 in the first reading.

        After ``damp``, which needs the bus, this is the last reading again.

        Raises:
            BridgeError: The link is lost, a motor is too hot or reports an error.
        """
        if self._damped:
            return dict(self._latest)
        if self._health_registers and time.monotonic() >= self._next_health_at:
            self._check_health()
        angles = _call(self._read_angles)
        stamp = time.monotonic()

        speeds = [0.0] * len(angles)
        if self._seq:
            passed_s = stamp - self._stamp
            pairs = zip(angles, self._angles, strict=True)
            speeds = [(new - old) / passed_s for new, old in pairs]

        self._angles = angles
        if may_be_held(dict(zip(self._joints, angles, strict=True)), self._limits):
            self._held_angles = angles
        self._stamp = stamp
        self._seq += 1
        self._latest = {
            "stamp": stamp,
            "seq": self._seq,
            **dict(zip(self._position_keys, angles, strict=True)),
            **dict(zip(self._velocity_keys, speeds, strict=True)),
        }
        return dict(self._latest)

    def send_action(self, action: Command) -> dict[str, float]:
        """Command the motors; return what LeRobot really sent. After ``damp`` nothing is sent."""
        targets = validated_command(action, self._position_keys)
        if self._damped:
            return {}
        sent = self._send_angles(targets)
        # damp may have been called meanwhile, from another thread
        if self._damped:
            self.damp()
        return sent

    def damp(self) -> None:
        """Switch the motors' torque off; retry for a while if another thread is using the bus.

        Raises:
            BridgeError: It did not succeed within ``DAMP_RETRY_S``.
        """
        self._damped = True
        if not self._connected:
            return
        end = time.monotonic() + DAMP_RETRY_S
        while True:
            try:
                if self._limp is not None:
                    _call(self._limp)
                else:
                    self._send_angles(self._held_angles)
            except BridgeError:
                if time.monotonic() > end:
                    raise
                time.sleep(RETRY_INTERVAL_S)
            else:
                return

    def disconnect(self) -> None:
        """Close the robot; a second call does nothing."""
        if self._connected:
            self._connected = False
            _call(self._robot.disconnect)

    def _find_health_registers(self) -> None:
        """Check every register that the bus has; the others are not asked for again.

        Raises:
            BridgeError: A motor is too hot or reports an error.
        """
        self._health_registers = []
        self._next_health_at = 0.0
        if self._registers is None:
            return
        for register in HEALTH_REGISTERS:
            # A bus without it raises, each kind another error
            with suppress(Exception):
                self._registers.sync_read(register, normalize=False)
                self._health_registers.append(register)
        for _ in range(len(self._health_registers)):
            self._check_health()

    def _check_health(self) -> None:
        """Read the next register of all motors, and judge it."""
        assert self._registers is not None
        registers = self._registers
        register = self._health_registers.pop(0)
        self._health_registers.append(register)
        self._next_health_at = time.monotonic() + HEALTH_INTERVAL_S
        numbers = _call(lambda: registers.sync_read(register, normalize=False))

        for motor, number in numbers.items():
            if register != TEMPERATURE_REGISTER and number:
                raise BridgeError(f"the motor {motor} reports an error: {register} is {number}")
            if register == TEMPERATURE_REGISTER and not number <= self._max_motor_c:
                raise BridgeError(
                    f"the motor {motor} is at {number} °C, more than {self._max_motor_c:g}"
                )

    def _read_angles(self) -> list[float]:
        numbers = self._robot.get_observation()
        return [motor.to_rad(float(numbers[motor.key])) for motor in self._motors]

    def _send_angles(self, angles: list[float]) -> dict[str, float]:
        """Send goals, rad; return those that LeRobot says it really sent, by joint."""
        if not all(map(math.isfinite, angles)):
            raise BridgeError(f"targets that are not finite, and are not sent: {angles}")
        goals = {
            motor.key: motor.to_number(angle)
            for motor, angle in zip(self._motors, angles, strict=True)
        }
        sent = _call(lambda: self._robot.send_action(goals))
        return {
            key: motor.to_rad(float(sent[motor.key]))
            for key, motor in zip(self._position_keys, self._motors, strict=True)
            if motor.key in sent
        }


def _call(method: Callable[[], ResultT]) -> ResultT:
    """Call a method of the robot; whatever a plug-in raises is a lost link."""
    try:
        return method()
    except Exception as error:
        raise BridgeError(f"link lost: {error or type(error).__name__}") from error
