"""A Go2's own signals: its remote, and what its motors, battery and board report of themselves.

What the numbers of a ``LowState`` mean is documented here and in docs/robot.md. Lost packets, a
motor's mode and the board's flags are judged by how they change: what they are on a robot that is
well differs between firmwares, and simulators leave them at zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from metarobot.bridge.errors import BridgeError, OperatorStopError

# Where the numbers are in a LowState. Each of the twelve motors has twelve numbers: mode, ...,
# temperature (the ninth), packets lost (the tenth), reserved
_MOTORS = 12
_FIRST_MOTOR = 23
_MOTOR_NUMBERS = 12
_END_OF_MOTORS = _FIRST_MOTOR + _MOTORS * _MOTOR_NUMBERS
_MODES = slice(_FIRST_MOTOR, _END_OF_MOTORS, _MOTOR_NUMBERS)
_TEMPERATURES = slice(_FIRST_MOTOR + 8, _END_OF_MOTORS, _MOTOR_NUMBERS)
_LOST = slice(_FIRST_MOTOR + 9, _END_OF_MOTORS, _MOTOR_NUMBERS)
_BATTERY = slice(263, 288)
_CHARGE = 266
_TICK = 296
_REMOTE = 297
_BIT_FLAG = 337

# The remote's 40 bytes are ``xRockerBtnDataStruct`` of Unitree's SDKs: two bytes of head, 16 bits
# of buttons from the lowest up (R1 L1 start select R2 L2 F1 F2, then A B X Y up right down left),
# and the sticks
_BUTTONS_LOW = _REMOTE + 2
_BUTTONS_HIGH = _REMOTE + 3
L2_BIT = 0x20
"""Of the third byte."""
B_BIT = 0x02
"""Of the fourth byte."""

SERVO_MODE = 1
"""A motor's mode while it follows commands."""
MAX_MOTOR_C = 85.0
"""Hottest motor, °C."""
MIN_CHARGE = 5.0
"""Lowest charge of the battery, %."""
MAX_LOST_PACKETS = 100
"""Most packets that the board may lose to a motor in ``LOST_WINDOW_MS``: a tenth or so."""
LOST_WINDOW_MS = 1000
BOARD_FLAGS = {0x80: "motors silent", 0x40: "microcontroller silent", 0x10: "battery silent"}
"""Bit of ``bit_flag`` -> meaning. 0x20, a silent remote, is no fault: it may be switched off."""
CHECKED_READINGS = 50
MAX_BAD_CHECKSUMS = 5
"""Most readings with a wrong checksum among the last ``CHECKED_READINGS``."""


class Go2Health:
    """Check each message of a robot, one after the other.

    Args:
        joints: Names of the motors.
        max_motor_c: Hottest motor, °C.
        min_charge: Lowest charge, %; not checked where no battery is reported.
    """

    def __init__(self, joints: Sequence[str], max_motor_c: float, min_charge: float) -> None:
        self._joints = joints
        self._max_motor_c = max_motor_c
        self._min_charge = min_charge
        self._had_servo_mode = [False] * _MOTORS
        self._lost: Sequence[float] = ()
        self._lost_since = 0.0
        self._first_flags = -1
        self._wrong: deque[bool] = deque(maxlen=CHECKED_READINGS)

    def note_checksum(self, is_right: bool) -> None:
        """Count a message's checksum.

        Raises:
            BridgeError: Too many of the last ones were wrong.
        """
        self._wrong.append(not is_right)
        if not is_right and (bad := sum(self._wrong)) > MAX_BAD_CHECKSUMS:
            raise BridgeError(
                f"bit errors: {bad} of the last {len(self._wrong)} readings have a wrong checksum"
            )

    def check(self, numbers: Sequence[float]) -> None:
        """Check a message's numbers.

        Raises:
            OperatorStopError: The remote's damping combination is pressed.
            BridgeError: The robot reports a fault of its own.
        """
        if int(numbers[_BUTTONS_LOW]) & L2_BIT and int(numbers[_BUTTONS_HIGH]) & B_BIT:
            raise OperatorStopError("L2+B was pressed on the robot's remote")
        self._check_motors(numbers)
        self._check_board(numbers)

    def _check_motors(self, numbers: Sequence[float]) -> None:
        temperatures = numbers[_TEMPERATURES]
        if (hottest := max(temperatures)) > self._max_motor_c:
            joint = self._joints[temperatures.index(hottest)]
            raise BridgeError(
                f"the motor {joint} is at {hottest:g} °C, more than {self._max_motor_c:g}"
            )

        for i, mode in enumerate(numbers[_MODES]):
            if mode == SERVO_MODE:
                self._had_servo_mode[i] = True
            elif self._had_servo_mode[i]:
                raise BridgeError(
                    f"the motor {self._joints[i]} follows commands no more: its mode is {mode:g}"
                )

        lost = numbers[_LOST]
        if not self._lost or numbers[_TICK] - self._lost_since >= LOST_WINDOW_MS:
            self._lost = lost
            self._lost_since = numbers[_TICK]
        elif lost != self._lost:
            for joint, now, before in zip(self._joints, lost, self._lost, strict=True):
                if now - before > MAX_LOST_PACKETS:
                    raise BridgeError(
                        f"the robot lost {now - before:g} packets of the motor {joint} within "
                        f"{LOST_WINDOW_MS / 1e3:g} s, more than {MAX_LOST_PACKETS}"
                    )

    def _check_board(self, numbers: Sequence[float]) -> None:
        charge = numbers[_CHARGE]
        # Simulators report no battery: all its numbers are zero
        if charge < self._min_charge and any(numbers[_BATTERY]):
            raise BridgeError(f"the battery is at {charge:g} %, less than {self._min_charge:g}")

        flags = int(numbers[_BIT_FLAG])
        if self._first_flags < 0:
            self._first_flags = flags
        new_flags = flags & ~self._first_flags
        for bit, meaning in BOARD_FLAGS.items():
            if new_flags & bit:
                raise BridgeError(f"the robot's board reports a fault: {meaning} (0x{bit:02x})")
