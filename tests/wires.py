"""The far end of a DDS network, for tests: it listens to commands and publishes readings."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip(
    "cyclonedds", reason="robots on DDS need cyclonedds: pip install 'metarobot[deploy]'"
)

from metarobot.bridge.policy.metadata import JointLimit
from metarobot.bridge.robots import ros2_messages as ros
from metarobot.bridge.robots.dds import DdsParticipant

PUBLISH_INTERVAL_S = 0.005


def domain() -> int:
    """Return a DDS domain for one test, which tests that run beside it do not share."""
    return random.Random(os.urandom(8)).randrange(1, 200)


def meta(joints: Sequence[str] = ("a", "b"), layout: str = "direct") -> Any:
    """Return what a robot reads of a policy's metadata; gains count up."""
    gains = range(1, 1 + len(joints))
    return SimpleNamespace(
        joint_names=tuple(joints),
        joint_stiffness=tuple(10.0 * k for k in gains),
        joint_damping=tuple(0.5 * k for k in gains),
        limits=dict.fromkeys(joints, JointLimit(-30.0, 30.0, 50.0, 100.0)),
        layout=layout,
        reward={"legs": {"FL": {}, "FR": {}}} if layout == "legged" else None,
    )


def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """Poll until ``condition`` returns something true, and return that; fail after a while."""
    end = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
    return answer


@contextmanager
def beating(publish: Callable[[float], object]) -> Iterator[None]:
    """Call ``publish`` every 5 ms, from a thread of its own, with the time since the start, s."""
    done = threading.Event()
    started = time.monotonic()

    def publish_until_done() -> None:
        while not done.wait(PUBLISH_INTERVAL_S):
            publish(time.monotonic() - started)

    thread = threading.Thread(target=publish_until_done)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class FakeRos2Controller:
    """The far end of ``Ros2Robot``: joint states in its own order and names, and commands."""

    names = ("spare", "b_joint", "a")

    def __init__(self, number: int, name: str = "fwd") -> None:
        self.number = number
        """The DDS domain."""
        self.link = DdsParticipant("lo", number)
        self._states = self.link.writer("rt/joint_states", ros.JointState)
        self._imu = self.link.writer("rt/imu/data", ros.Imu)
        self._feet = self.link.writer("rt/foot_forces", ros.Float64MultiArray)
        self._commands = self.link.reader(f"rt/{name}/commands", ros.Float64MultiArray)

    def publish(
        self, stamp: float, position: Sequence[float] = (0.0, 2.0, 1.0), **other: Any
    ) -> None:
        """Publish joint states; ``other`` overrides velocity, effort and name."""
        joints = range(len(position))
        velocity = other.get("velocity", [0.1 * k for k in joints])
        effort = other.get("effort", [-1.0 * k for k in joints])
        names = list(other.get("name", self.names))
        self._states.send(ros.JointState(head(stamp), names, list(position), velocity, effort))

    def tilt(self, stamp: float) -> None:
        """Publish an IMU reading whose seven numbers count up, and the forces of two feet."""
        self._feet.send(ros.Float64MultiArray(ros.MultiArrayLayout([], 0), [10.0, 20.0]))
        orientation = ros.Quaternion(2.0, 3.0, 4.0, 1.0)
        velocity = ros.Vector3(5.0, 6.0, 7.0)
        covariance = [0.0] * 9
        self._imu.send(
            ros.Imu(
                head(stamp), orientation, covariance, velocity, covariance, velocity, covariance
            )
        )

    def alive(self, **joints: Any) -> AbstractContextManager[None]:
        """Publish joint states and IMU every 5 ms."""
        return beating(lambda stamp: (self.publish(stamp, **joints), self.tilt(stamp)))

    def commanded(self) -> list[float] | None:
        """Return the newest command's numbers, None if none is new."""
        message = self._commands.newest()
        return None if message is None else list(message.data)


def head(stamp: float) -> ros.Header:
    """Return a header with a time stamp, s."""
    return ros.Header(ros.Time(int(stamp), round(stamp % 1 * 1e9)), "")
