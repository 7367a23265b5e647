"""Robots at the far end of a wire, for tests: what listens to commands and publishes readings."""

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

from metarobot.bridge.robots import ros2_messages as ros
from metarobot.bridge.robots.dds import Link


def domain() -> int:
    """Return a DDS domain for one test, that runs beside this one do not share."""
    return random.Random(os.urandom(8)).randrange(1, 200)


def meta(joints: Sequence[str] = ("a", "b"), layout: str = "direct") -> Any:
    """Return what a robot reads of a policy's metadata; gains count up."""
    gains = range(1, 1 + len(joints))
    return SimpleNamespace(
        joint_names=tuple(joints),
        joint_stiffness=tuple(10.0 * k for k in gains),
        joint_damping=tuple(0.5 * k for k in gains),
        layout=layout,
        reward={"legs": {"FL": {}, "FR": {}}} if layout == "legged" else None,
    )


def until(ready: Callable[[], Any], timeout: float = 15.0) -> Any:
    """Poll for something; fail after a while."""
    end = time.monotonic() + timeout
    while not (answer := ready()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
    return answer


@contextmanager
def beating(publish: Callable[[float], object]) -> Iterator[None]:
    """Publish every 5 ms, from a thread of its own, what depends on the time since then, s."""
    done, begun = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(0.005):
            publish(time.monotonic() - begun)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Controller:
    """The far end of ``ros2``: joint states out in ROS's own order and names, commands in."""

    names = ("spare", "b_joint", "a")

    def __init__(self, number: int, name: str = "fwd") -> None:
        self.number, self.link = number, Link("lo", number)
        self._states = self.link.writer("rt/joint_states", ros.JointState)
        self._imu = self.link.writer("rt/imu/data", ros.Imu)
        self._feet = self.link.writer("rt/foot_forces", ros.Float64MultiArray)
        self._commands = self.link.reader(f"rt/{name}/commands", ros.Float64MultiArray)

    def publish(
        self, stamp: float, position: Sequence[float] = (0.0, 2.0, 1.0), **other: Any
    ) -> None:
        """Publish joint states; ``other`` overrides velocity, effort and name."""
        n = len(position)
        filled = {
            "velocity": [0.1 * k for k in range(n)],
            "effort": [-1.0 * k for k in range(n)],
        } | other
        names = list(filled.pop("name", self.names))
        self._states.send(
            ros.JointState(head(stamp), names, list(position), filled["velocity"], filled["effort"])
        )

    def tilt(self, stamp: float) -> None:
        """Publish an IMU reading whose seven numbers count up, and the forces of two feet."""
        self._feet.send(ros.Float64MultiArray(ros.MultiArrayLayout([], 0), [10.0, 20.0]))
        turn, none = ros.Vector3(5.0, 6.0, 7.0), [0.0] * 9
        self._imu.send(
            ros.Imu(head(stamp), ros.Quaternion(2.0, 3.0, 4.0, 1.0), none, turn, none, turn, none)
        )

    def alive(self, **joints: Any) -> AbstractContextManager[None]:
        """Publish every 5 ms."""
        return beating(lambda stamp: (self.publish(stamp, **joints), self.tilt(stamp)))

    def commanded(self) -> list[float] | None:
        """Return the newest command's numbers, None if none is new."""
        return None if (message := self._commands.newest()) is None else list(message.data)


def head(stamp: float) -> ros.Header:
    """Return a header measured then."""
    return ros.Header(ros.Time(int(stamp), round(stamp % 1 * 1e9)), "")
