"""Any robot of LeRobot's kind as a robot of ours, without LeRobot: by its verbs alone.

LeRobot's robots speak of motors in degrees or in hundredths of their calibrated range, a policy of
joints in rad. A table of channels says how the two belong together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Command
from metarobot.bridge.safety.command_checks import checked

if TYPE_CHECKING:
    from metarobot.bridge.policy.metadata import Meta

RETRY = 0.2
"""How long ``damp`` tries when the robot's bus is busy, s."""


class LeRobotLike(Protocol):
    """What is used of ``lerobot.robots.Robot``."""

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


@dataclass(frozen=True)
class Channel:
    """How a motor's number and a joint's angle belong together: rad = zero + scale · number."""

    key: str
    """The motor's key in observations and actions, ``shoulder_pan.pos``."""
    scale: float
    """rad for a unit; negative if the two turn against each other."""
    zero: float = 0.0
    """Angle at the number 0, rad."""

    @classmethod
    def degrees(cls, key: str, sign: int = 1, zero: float = 0.0) -> Self:
        """Read a motor in degrees (``use_degrees``)."""
        return cls(key, sign * math.pi / 180, zero)

    @classmethod
    def ranged(
        cls, key: str, low: float, high: float, span: tuple[float, float] = (-100.0, 100.0)
    ) -> Self:
        """Read a motor whose numbers at the ends of ``span`` stand for the angles ``low`` and
        ``high``, rad.

        A gripper's span is (0, 100) in LeRobot.
        """
        scale = (high - low) / (span[1] - span[0])
        return cls(key, scale, low - scale * span[0])


class LeRobot:
    """A LeRobot robot driven in rad by a policy's joint names.

    table: a channel for each joint of the policy; motors without one are left alone. limp: what
    makes the robot limp, ``robot.bus.disable_torque`` if it has that. Without either, ``damp``
    commands each motor to where it is, and it stays there, stiff.

    LeRobot measures no speeds and keeps no clock: speeds are differences between readings, the
    stamp is when a reading came back. Reading takes as long as the bus does, a few ms for six
    servos. A second process cannot have the same port, so nothing damps the robot if this one is
    killed: its motors then hold their last goals.
    """

    name = "lerobot"
    guarded = False

    def __init__(
        self,
        robot: LeRobotLike,
        meta: Meta,
        table: Mapping[str, Channel],
        limp: Callable[[], object] | None = None,
    ) -> None:
        if table.keys() != set(meta.joint_names):
            ours, theirs = ", ".join(meta.joint_names), ", ".join(table)
            raise BridgeError(
                f"the policy's joints {ours or 'none'} are not the table's: {theirs or 'none'}"
            )
        features = robot.observation_features.keys() & robot.action_features.keys()
        if unknown := [channel.key for channel in table.values() if channel.key not in features]:
            raise BridgeError(
                f"{robot.name} has no motor {', '.join(unknown)}; it has {', '.join(sorted(features))}"
            )
        self.identity = f"lerobot {robot.name} {getattr(robot, 'id', None) or ''}".rstrip()
        self._robot, self._table = robot, {joint: table[joint] for joint in meta.joint_names}
        self._keys = [f"{joint}.pos" for joint in self._table]
        self._limp = limp or getattr(getattr(robot, "bus", None), "disable_torque", None)
        self._connected = self._damped = False

    def connect(self) -> None:
        """Open the robot and read it once; it must be calibrated, for calibrating moves it and asks
        questions.
        """
        _tried(lambda: self._robot.connect(calibrate=False))
        self._connected, self._damped = True, False
        self._angles, self._stamp, self._seq = [math.nan] * len(self._table), 0.0, 0
        self._reading: dict[str, float] = {}
        if not self._robot.is_calibrated:
            self.disconnect()
            raise BridgeError(f"{self._robot.name} is not calibrated; run lerobot-calibrate first")
        self.get_observation()

    def get_observation(self) -> dict[str, float]:
        """Read all motors now; speeds are 0 on the first reading. After ``damp``, which has the
        bus, it is the last.
        """
        if self._damped:
            return dict(self._reading)
        angles, stamp = _tried(self._read), time.monotonic()
        passed = stamp - self._stamp
        speeds = [
            (new - old) / passed if self._seq else 0.0
            for new, old in zip(angles, self._angles, strict=True)
        ]
        self._angles, self._stamp, self._seq = angles, stamp, self._seq + 1
        velocities = zip((f"{joint}.vel" for joint in self._table), speeds, strict=True)
        self._reading = {
            "stamp": stamp,
            "seq": self._seq,
            **dict(zip(self._keys, angles, strict=True)),
            **dict(velocities),
        }
        return dict(self._reading)

    def send_action(self, action: Command) -> dict[str, float]:
        """Command the motors; return what LeRobot says it really sent. After ``damp`` nothing is
        sent.
        """
        targets = checked(action, self._keys)
        if self._damped:
            return {}
        sent = self._send(targets)
        # damp may have come in between, from another thread
        if self._damped:
            self.damp()
        return sent

    def damp(self) -> None:
        """Switch the motors' torque off; try again for a while if another thread is using the
        bus.
        """
        self._damped = True
        if not self._connected:
            return
        end = time.monotonic() + RETRY
        while True:
            try:
                _tried(self._limp or (lambda: self._send(self._angles)))
            except BridgeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.001)
            else:
                return

    def disconnect(self) -> None:
        """Close the robot."""
        if self._connected:
            self._connected = False
            _tried(self._robot.disconnect)

    def _read(self) -> list[float]:
        numbers = self._robot.get_observation()
        return [c.zero + c.scale * float(numbers[c.key]) for c in self._table.values()]

    def _send(self, targets: list[float]) -> dict[str, float]:
        if not all(map(math.isfinite, targets)):
            raise BridgeError(f"targets that are not finite, and are not sent: {targets}")
        goals = {
            c.key: (q - c.zero) / c.scale
            for c, q in zip(self._table.values(), targets, strict=True)
        }
        sent = _tried(lambda: self._robot.send_action(goals))
        channels = zip(self._keys, self._table.values(), strict=True)
        return {key: c.zero + c.scale * float(sent[c.key]) for key, c in channels if c.key in sent}


def _tried(verb: Callable[[], Any]) -> Any:
    """Do something with the robot; whatever a plug-in raises is a lost link."""
    try:
        return verb()
    except Exception as error:
        raise BridgeError(f"link lost: {error or type(error).__name__}") from error
