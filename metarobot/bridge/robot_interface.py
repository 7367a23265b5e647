"""What a robot is for the controller: LeRobot's four verbs and one more, which makes it limp.

A **reading** is a flat dict of floats, a **command** too. Keys of a reading:

- ``stamp``, s on the robot's own clock, and ``seq``, counting up: both always there, moving on with
  each reading;
- joints: ``{joint}.pos`` rad, ``{joint}.vel`` rad/s, ``{joint}.tau`` N·m;
- the trunk's IMU: ``imu.quat.{w,x,y,z}``, trunk to world, and ``imu.gyro.{x,y,z}``, rad/s in the
  trunk's frame;
- feet: ``{leg}.force`` N, if measured;
- robots of a ``direct`` policy: the names of its observations instead of all these;
- ``reward``, what the last command earned, and ``terminated``, 1.0 when the episode is over, if the
  robot is told.

Keys of a command: ``{joint}.pos``, the target of its PD drive, rad; for a ``direct`` policy the
names of its actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Reading = Mapping[str, float]
Command = Mapping[str, float]

QUAT = tuple(f"imu.quat.{a}" for a in "wxyz")
GYRO = tuple(f"imu.gyro.{a}" for a in "xyz")


class Robot(Protocol):
    """A robot as the controller knows it. Gains and joint order come from the policy's metadata at
    construction.

    ``damp`` is called from another thread than the rest when the rest hangs, so it must take no
    lock that another verb holds while it waits for the robot.
    """

    name: str
    """What it is called in messages and in the log."""
    identity: str
    """Which robot it is, the same for every controller that would drive it: one of them at a time
    may."""
    guarded: bool
    """Whether it goes on with the last command for ever when commands stop. Then a second process,
    connected as this one is, sends damping when this one dies."""

    def connect(self) -> None:
        """Open the link and wait for a first reading; sends no command.

        Raises ``BridgeError`` in one line: interface missing or busy, no reading in time, joints
        that are not its own.
        """

    def get_observation(self) -> dict[str, float]:
        """Return the latest reading without waiting for a new one: a frozen ``stamp`` is the
        controller's business.

        Raises ``BridgeError`` if the link is known to be lost.
        """

    def send_action(self, action: Command) -> dict[str, float]:
        """Command the drives; return what was really sent, which may be less than was asked."""

    def damp(self) -> None:
        """Make the robot limp at once: damping alone, no position gains. In any state, from any
        thread, again too.
        """

    def disconnect(self) -> None:
        """Close the link; a second time does nothing."""


@runtime_checkable
class Restarts(Protocol):
    """A robot that can put itself where an episode begins, as a simulated one can; others are
    walked there and held.
    """

    def restart(self, episode: int) -> None:
        """Begin the trial's next episode, counted from 0; the next reading is its first. Ends
        damping.
        """


@runtime_checkable
class Waits(Protocol):
    """A robot that keeps step with its controller, as a simulated one can: it says when the next
    reading is there.
    """

    def await_reading(self) -> None:
        """Return when there is a reading that was not handed out, or when there ought to have been
        one.
        """


class Layout(Protocol):
    """How readings become observations, and actions commands; keeps what it needs of the
    episode.
    """

    def needed(self) -> tuple[str, ...]:
        """Name the keys that a reading must have."""

    def begin(self) -> None:
        """Forget the episode before: the next reading is the first of a new one."""

    def observe(self, reading: Reading, last_action: Floats) -> Floats:
        """Return the policy's observation, ``(obs,)``; the last action, ``(act,)``, is 0 on an
        episode's first step.
        """

    def targets(self, action: Floats) -> dict[str, float]:
        """Return the command that an action, ``(act,)`` and clipped to its bounds, stands for."""

    def reward(self, before: Reading, after: Reading, action: Floats, last_action: Floats) -> float:
        """Return what ``action`` earned, which led from one reading to the next; ``last_action``
        came before it.
        """

    def ended(self, reading: Reading) -> bool:
        """Say whether the episode is over early: the robot has fallen."""
