"""A robot behind ROS 2's forward_command_controller, over DDS without a ROS install.

In: ``/joint_states``, matched by name, and ``/imu/data`` for robots with legs. Out: the joints'
target angles on ``/<controller>/commands``. That controller drops a message with a number that is
not finite, is put out of action by one of the wrong length, and holds the last one for ever; so
neither of these is sent, and when commands end somebody must send a last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import GYRO, QUAT, Command
from metarobot.bridge.robots.dds_robot import Wired
from metarobot.bridge.safety.command_checks import checked

if TYPE_CHECKING:
    from metarobot.bridge.policy.metadata import Meta
    from metarobot.bridge.robots.dds import Wire
    from metarobot.bridge.robots.ros2_messages import (
        Float64,
        Float64MultiArray,
        Header,
        Imu,
        JointState,
    )


class Ros2(Wired["JointState", "Float64MultiArray"]):
    """A robot on ROS 2 with position drives: a forward_command_controller on the interface
    ``position``.

    interface, domain: network interface and ROS_DOMAIN_ID. controller: name of the
    forward_command_controller. joints: its parameter ``joints``, as the policy calls them and with
    commas between; the policy's own order if not given. ROS may call joint ``x`` ``x_joint``.
    states, imu, feet, reward: topics. ``imu`` is read for a legged policy; ``feet``, a
    std_msgs/Float64MultiArray of the feet's forces, N, legs in the policy's order, if its reward
    needs it; ``reward``, a std_msgs/Float64, if given. timeout: s, how long ``connect`` waits for
    each of them. guard: whether it stands beside a controller, to damp when that one dies; else
    another one is not suffered.

    There is no damping behind position drives. ``damp`` commands each joint to where it is: called
    again and again the robot yields and sinks; called once, it gives way as far as its drives do
    under their load, and stays there, stiff.
    """

    name = "ros2"

    def __init__(
        self,
        meta: Meta,
        *,
        interface: str = "lo",
        domain: int = 0,
        controller: str = "forward_position_controller",
        joints: str = "",
        states: str = "joint_states",
        imu: str = "imu/data",
        feet: str = "foot_forces",
        reward: str = "",
        timeout: float = 5.0,
        guard: bool = False,
    ) -> None:
        super().__init__(interface, domain, timeout)
        self.identity = f"ros2 {controller} on {interface}, domain {domain}"
        self._joints = tuple(joints.split(",")) if joints else tuple(meta.joint_names)
        if sorted(self._joints) != sorted(meta.joint_names):
            ours, theirs = ", ".join(meta.joint_names), ", ".join(self._joints)
            raise BridgeError(
                f"the policy's joints {ours or 'none'} are not {controller}'s: {theirs or 'none'}"
            )
        self._keys = {
            part: [f"{joint}.{part}" for joint in self._joints] for part in ("pos", "vel", "tau")
        }
        self._commands, self._states = f"rt/{controller}/commands", f"rt/{states}"
        self._reward = f"rt/{reward}" if reward else ""
        self._imu = f"rt/{imu}" if meta.layout == "legged" else ""
        self._forces = [f"{leg}.force" for leg in (meta.reward or {}).get("legs", ())]
        self._feet = f"rt/{feet}" if self._forces else ""
        self._guard = guard

    def _open(self) -> Wire[JointState, Float64MultiArray]:
        from metarobot.bridge.robots import dds
        from metarobot.bridge.robots import ros2_messages as ros2_idl

        link = dds.Link(*self._place)
        states, commands = (
            (self._states, ros2_idl.JointState),
            (self._commands, ros2_idl.Float64MultiArray),
        )
        wire = dds.Wire(link, states, commands, self._guard)
        self._sources: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, float]]]] = {}
        self._sources[self._states] = wire.newest, self._joint_reading
        if self._imu:
            self._sources[self._imu] = link.reader(self._imu, ros2_idl.Imu).newest, _imu_reading
        if self._feet:
            self._sources[self._feet] = (
                link.reader(self._feet, ros2_idl.Float64MultiArray).newest,
                self._foot_reading,
            )
        if self._reward:
            self._sources[self._reward] = (
                link.reader(self._reward, ros2_idl.Float64).newest,
                _reward_reading,
            )
        self._parts: dict[str, dict[str, float]] = {}
        self._names: Sequence[str] = ()
        self._measured: list[float] = []
        self._seq = 0
        return wire

    def _await(self, wire: Wire[JointState, Float64MultiArray]) -> None:
        awaited = {self._states, self._imu, self._feet} - {""}
        wire.link.wait(
            lambda: awaited <= self._take().keys(),
            self._timeout,
            lambda: f"nothing on {', '.join(sorted(awaited - self._parts.keys()))}",
        )
        if not self._measured:
            raise BridgeError(f"the joints' positions on {self._states} are not finite")

    def get_observation(self) -> dict[str, float]:
        """Return the newest readings of joints and IMU; ``stamp`` is the older one's, so that
        neither may freeze.
        """
        self._connected().check()
        parts = self._take().values()
        stamp = min(part["stamp"] for part in parts if "stamp" in part)
        return {key: value for part in parts for key, value in part.items()} | {
            "stamp": stamp,
            "seq": self._seq,
        }

    def send_action(self, action: Command) -> dict[str, float]:
        """Publish the joints' targets; return none when ``damp`` has been called, for then none is
        sent.
        """
        targets = checked(action, self._keys["pos"])
        return dict(action) if self._connected().send(_array(targets)) else {}

    def damp(self) -> None:
        """Command every joint to where it was measured last."""
        if (wire := self._wire) is not None:
            with suppress(BridgeError):
                self._take()
            # an empty command, before the first reading, would put the controller out of action
            if self._measured:
                wire.damp(_array(self._measured))

    def _take(self) -> dict[str, dict[str, float]]:
        """Read what is new; return the newest readings by topic."""
        for topic, (newest, reading) in self._sources.items():
            if (message := newest()) is not None:
                self._parts[topic] = reading(message)
        return self._parts

    def _joint_reading(self, message: JointState) -> dict[str, float]:
        if message.name != self._names:
            self._order, self._names = _order(self._joints, message.name), message.name
        reading = {"stamp": _seconds(message.header)}
        for part, values in (
            ("pos", message.position),
            ("vel", message.velocity),
            ("tau", message.effort),
        ):
            # empty means: not measured
            if len(values) not in (0, len(self._names)):
                raise BridgeError(
                    f"{self._states} has {len(values)} numbers for {len(self._names)} joints"
                )
            reading.update(
                zip(
                    self._keys[part],
                    [values[i] for i in self._order] if values else (),
                    strict=False,
                )
            )
        positions = [reading.get(key, math.nan) for key in self._keys["pos"]]
        if all(map(math.isfinite, positions)):
            self._measured = positions
        self._seq += 1
        return reading

    def _foot_reading(self, message: Float64MultiArray) -> dict[str, float]:
        if len(message.data) != len(self._forces):
            raise BridgeError(
                f"{self._feet} has {len(message.data)} numbers for {len(self._forces)} feet"
            )
        return dict(zip(self._forces, message.data, strict=True))


def _order(joints: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return where each joint is among ROS's names."""
    places = {name.removesuffix("_joint"): i for i, name in enumerate(names)} | {
        name: i for i, name in enumerate(names)
    }
    if missing := [joint for joint in joints if joint not in places]:
        raise BridgeError(f"no joint {', '.join(missing)} among the robot's: {', '.join(names)}")
    return [places[joint] for joint in joints]


def _imu_reading(message: Imu) -> dict[str, float]:
    q, gyro = message.orientation, message.angular_velocity
    numbers = q.w, q.x, q.y, q.z, gyro.x, gyro.y, gyro.z
    return {"stamp": _seconds(message.header), **dict(zip((*QUAT, *GYRO), numbers, strict=True))}


def _reward_reading(message: Float64) -> dict[str, float]:
    return {"reward": message.data}


def _seconds(header: Header) -> float:
    return float(header.stamp.sec + header.stamp.nanosec * 1e-9)


def _array(numbers: list[float]) -> Float64MultiArray:
    from metarobot.bridge.robots.ros2_messages import Float64MultiArray, MultiArrayLayout

    return Float64MultiArray(MultiArrayLayout([], 0), numbers)
