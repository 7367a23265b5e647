"""Unitree's Go2 by its low-level messages, over DDS and without Unitree's SDK.

In: ``rt/lowstate``, what fails its checksum is dropped and counted. Out: ``rt/lowcmd``, target
angle and gains of each motor. The robot's own walking service must have been stopped (in the app,
or by the SDK's motion switcher): it publishes the same commands, and ``connect`` refuses while it
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import GYRO, QUAT, Command
from metarobot.bridge.robots.dds_robot import Wired
from metarobot.bridge.safety.command_checks import checked

if TYPE_CHECKING:
    from metarobot.bridge.policy.metadata import Meta
    from metarobot.bridge.robots.dds import Wire
    from metarobot.bridge.robots.unitree_messages import LowCmd, LowState

LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{part}" for leg in LEGS for part in ("hip", "thigh", "calf"))
"""The motors, in the order of the messages."""

POS_STOP, VEL_STOP = 2.146e9, 16000.0
"""Targets that mean: do not control the position, the speed (``PosStopF``, ``VelStopF`` of the
SDK)."""

# low level; then frame, serial number, version and bandwidth
_HEAD = [0xFE, 0xEF, 0xFF, 0, 0, 0, 0, 0, 0]
# battery, remote, lamps, fans, gpio, reserve, checksum
_TAIL = [0] * 61
# a motor's mode: servo
_ON = 1
_IDLE, _SPARE = [_ON, POS_STOP, VEL_STOP, 0.0, 0.0, 0.0, 0, 0, 0], 8
# how many numbers a LowState's head has, its IMU, each motor; and where in it feet and tick are
_HEADER, _IMU, _MOTOR, _FEET, _TICK = 9, 14, 12, 288, 296


class Unitree(Wired["LowState", "LowCmd"]):
    """A Go2, whose motors are position drives with the policy's gains.

    interface, domain: network interface on the robot's net (its computers are 192.168.123.x), and
    DDS domain. damping: N·m·s/rad, what each motor brakes with after ``damp``. foot_zero,
    foot_scale: what a foot's sensor says in the air, and N for a unit more of it; the sensor itself
    says numbers without a unit. checksums: whether readings must have a right checksum; some
    simulators send none. timeout: s, how long ``connect`` waits. guard: whether it stands beside a
    controller, to damp when that one dies; else another one is not suffered.
    """

    name = "unitree"

    def __init__(
        self,
        meta: Meta,
        *,
        interface: str = "lo",
        domain: int = 0,
        damping: float = 4.0,
        foot_zero: float = 0.0,
        foot_scale: float = 1.0,
        checksums: bool = True,
        timeout: float = 5.0,
        guard: bool = False,
    ) -> None:
        if sorted(meta.joint_names) != sorted(JOINTS):
            raise BridgeError(
                f"a policy for the joints {', '.join(meta.joint_names)}; a Go2 has {', '.join(JOINTS)}"
            )
        super().__init__(interface, domain, timeout)
        self.identity = f"unitree go2 on {interface}, domain {domain}"
        self.bad = 0
        """Readings dropped for a wrong checksum."""
        gains = zip(meta.joint_stiffness, meta.joint_damping, strict=True)
        by_joint = dict(zip(meta.joint_names, gains, strict=True))
        self._gains = [by_joint[joint] for joint in JOINTS]
        self._foot, self._damping, self._checksums, self._guard = (
            (foot_zero, foot_scale),
            damping,
            checksums,
            guard,
        )

    def _open(self) -> Wire[LowState, LowCmd]:
        from metarobot.bridge.robots import dds
        from metarobot.bridge.robots import unitree_messages as unitree_idl

        states, commands = ("rt/lowstate", unitree_idl.LowState), ("rt/lowcmd", unitree_idl.LowCmd)
        self._reading: dict[str, float] = {}
        return dds.Wire(dds.Link(*self._place), states, commands, self._guard)

    def _await(self, wire: Wire[LowState, LowCmd]) -> None:
        wire.link.wait(lambda: bool(self._take()), self._timeout, self._silent)

    def _silent(self) -> str:
        return (
            f"{self.bad} readings with a wrong checksum and no sound one"
            if self.bad
            else "nothing on rt/lowstate"
        )

    def get_observation(self) -> dict[str, float]:
        """Return the newest sound reading; ``stamp`` is the robot's tick, ``seq`` the same in
        ms.
        """
        self._connected().check()
        return dict(self._take())

    def send_action(self, action: Command) -> dict[str, float]:
        """Send the joints' targets with their gains; return none when ``damp`` has been called:
        none is sent.
        """
        targets = checked(action, _POSITIONS)
        motors = [
            (_ON, q, 0.0, 0.0, kp, kd, 0, 0, 0)
            for q, (kp, kd) in zip(targets, self._gains, strict=True)
        ]
        return dict(action) if self._connected().send(_message(motors)) else {}

    def damp(self) -> None:
        """Let every motor brake its speed and hold no position; motors keep the last command they
        got.
        """
        if self._wire is not None:
            self._wire.damp(
                _message([(_ON, POS_STOP, 0.0, 0.0, 0.0, self._damping, 0, 0, 0)] * len(JOINTS))
            )

    def _take(self) -> dict[str, float]:
        """Read what is new; return the newest sound reading."""
        if (state := self._connected().newest()) is not None:
            if self._checksums and not state.sound:
                self.bad += 1
            else:
                self._reading = _reading(state.numbers, *self._foot)
        return self._reading


_POSITIONS = [f"{joint}.pos" for joint in JOINTS]


def _reading(numbers: Sequence[float], foot_zero: float, foot_scale: float) -> dict[str, float]:
    """Name what a controller needs of a LowState's numbers."""
    reading = {"stamp": numbers[_TICK] * 1e-3, "seq": numbers[_TICK]}
    reading.update(zip((*QUAT, *GYRO), numbers[_HEADER : _HEADER + 7], strict=True))
    for i, joint in enumerate(JOINTS):
        _, q, dq, _, tau = numbers[_HEADER + _IMU + i * _MOTOR :][:5]
        reading |= {f"{joint}.pos": q, f"{joint}.vel": dq, f"{joint}.tau": tau}
    return reading | {
        f"{leg}.force": foot_scale * (numbers[_FEET + i] - foot_zero) for i, leg in enumerate(LEGS)
    }


def _message(motors: Sequence[Sequence[float]]) -> LowCmd:
    """Put twelve motors' commands into a message; the eight that a Go2 lacks stay idle."""
    from metarobot.bridge.robots.unitree_messages import LowCmd

    numbers = [number for motor in (*motors, *[_IDLE] * _SPARE) for number in motor]
    return LowCmd([*_HEAD, *numbers, *_TAIL])
