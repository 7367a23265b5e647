"""What the controller needs of a robot and of a layout, as protocols.

A robot has LeRobot's four methods (``connect``, ``get_observation``, ``send_action``,
``disconnect``) and one more, ``damp``. Readings and commands are flat dicts of floats.

Keys of a **reading**:

- ``stamp``: time on the robot's own clock, s, and ``seq``: a number that counts up. Both are always
  there and move on with each reading;
- joints: ``{joint}.pos`` rad, ``{joint}.vel`` rad/s, ``{joint}.tau`` N·m;
- the trunk's IMU: ``imu.quat.{w,x,y,z}``, rotation from trunk to world, and ``imu.gyro.{x,y,z}``,
  rad/s in the trunk's frame;
- feet: ``{leg}.force`` N, if measured;
- for a policy of layout ``direct``: the names of its observations instead of all these;
- optional: ``reward``, what the last command earned, and ``terminated``, 1.0 when the episode has
  ended.

Keys of a **command**: ``{joint}.pos``, the target of the joint's PD drive, rad; for a policy of
layout ``direct`` the names of its actions.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Reading = Mapping[str, float]
Command = Mapping[str, float]

QUAT = tuple(f"imu.quat.{axis}" for axis in "wxyz")
"""Keys of the trunk's orientation."""
GYRO = tuple(f"imu.gyro.{axis}" for axis in "xyz")
"""Keys of the trunk's angular velocity."""


class Robot(Protocol):
    """A robot that the controller can drive.

    The constructor gets the policy's metadata, with the drives' gains and the order of joints.
    ``damp`` is called from another thread when the loop's thread hangs in one of the other methods.
    So it must not wait for a lock that another method holds while it waits for the robot.
    """

    name: str
    """Name in messages and in the log."""
    identity: str
    """Which robot it is, the same in every process that would drive it: only one at a time may."""
    guarded: bool
    """Whether it goes on with the last command for ever when commands stop.

    Then a guard process, with a connection of its own, damps it when the controller dies."""

    def connect(self) -> None:
        """Open the connection and wait for a first reading; send no command.

        Raises:
            BridgeError: the interface is missing or busy, no reading came in time, or the robot has
                other joints than the policy.
        """

    def get_observation(self) -> dict[str, float]:
        """Return the latest reading without waiting for a new one.

        It may be an old one: the controller notices by its ``stamp`` and ``seq``.

        Raises:
            BridgeError: the connection is known to be lost.
        """

    def send_action(self, action: Command) -> dict[str, float]:
        """Command the drives; return what was really sent, which a driver may have reduced."""

    def damp(self) -> None:
        """Make the drives brake without holding a position: velocity gain alone, at once.

        Possible in any state, from any thread, and repeatedly.
        """

    def disconnect(self) -> None:
        """Close the connection; a second call does nothing."""


@runtime_checkable
class RestartableRobot(Protocol):
    """A robot that can put itself where an episode begins, as a simulated one can.

    Other robots are moved to the policy's default pose, and held there.
    """

    def restart(self, episode: int) -> None:
        """Begin the trial's next episode, counted from 0; damping ends.

        The next reading is the episode's first.
        """


@runtime_checkable
class TaskSelectableRobot(Protocol):
    """A robot that can take on one of several tasks, as a simulated one can."""

    def select_task(self, number: int) -> None:
        """Choose the task of the trial that the next restart begins; numbers wrap around."""


@runtime_checkable
class BlockingRobot(Protocol):
    """A robot that can say when its next reading is there, so that the controller keeps step."""

    def await_reading(self) -> None:
        """Return when there is a new reading, or when there ought to have been one."""


class SignalLayout(Protocol):
    """How readings become observations, and actions become commands.

    It may keep state of the episode, as odometry does.
    """

    def needed(self) -> tuple[str, ...]:
        """Return the keys that a reading must have."""

    def begin(self) -> None:
        """Begin an episode: the next reading is its first."""

    def observe(self, reading: Reading, last_action: Float32Array) -> Float32Array:
        """Return the policy's observation, ``(obs,)``.

        ``last_action`` is ``(act,)``, zeros in an episode's first step.
        """

    def targets(self, action: Float32Array) -> dict[str, float]:
        """Return the command that an action stands for; ``(act,)``, clipped to its bounds."""

    def reward(
        self, before: Reading, after: Reading, action: Float32Array, last_action: Float32Array
    ) -> float:
        """Return the reward of ``action``, which led from ``before`` to ``after``.

        ``last_action`` is the action before it.
        """

    def ended(self, reading: Reading) -> bool:
        """Return whether the episode has ended before its time: the robot has fallen."""


@runtime_checkable
class OperatorCommandLayout(Protocol):
    """A layout of a policy that follows an operator's velocity command."""

    command: MutableSequence[float]
    """Forward and sideways velocity, m/s, and turn rate, rad/s."""
