"""The one way from the controller to the drives, which closes for good; and the thread that closes
it.

Two things keep it open: readings that are new, and commands that are sent. Each must come within
the **patience**, two control periods + 10 ms, of the last one; else the robot is damped, whatever
the loop is doing: waiting for a policy that never returns, or for a driver, or for a lost link.
Counted on the wire, damping follows the last good reading within three control periods + 20 ms (a
reading waits up to a period until the loop looks), and the last command within two + 20 ms.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import Clock
from metarobot.bridge.robot_interface import Command, Robot

GRACE = 2e-3
"""How long damping waits for a command that is being sent, s, so as to come after it."""
AGAIN = 0.02
"""Damping is sent again so often, s."""


class DampedError(BridgeError):
    """The robot has been damped, and why."""


def patience(period: float) -> float:
    """Return how long nothing new may come or go before the robot is damped, s: two control periods
    + 10 ms.
    """
    return 2 * period + 0.01


def bounds(period: float) -> tuple[float, float]:
    """Return within what time damping follows the last good reading, and the last command, on the
    wire, s.
    """
    return 3 * period + 0.02, 2 * period + 0.02


class Gate:
    """Sends commands while all is well, and damping once it is not; never a command after
    damping.
    """

    def __init__(
        self, robot: Robot, clock: Clock, period: float, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.robot, self.clock, self.patience = robot, clock, patience(period)
        self.reason = ""
        """Why the robot was damped; nothing as long as it is not."""
        self.fault = True
        """Whether that was a fault, and nobody's wish."""
        self.damped_at = float("nan")
        self.noticed = False
        """Whether the loop has come back to notice it."""
        self.sent = 0
        """Commands that were sent."""
        self._beat, self._lock = beat, threading.Lock()
        self._reading_due = self._command_due = float("inf")

    def fresh(self) -> None:
        """Note that a new reading came."""
        self._reading_due = self.clock.now() + self.patience

    def expect(self, commands: bool) -> None:
        """From now on the robot is commanded, or held by itself and only watched."""
        self._command_due = self.clock.now() + self.patience if commands else float("inf")

    def pause(self, seconds: float = float("inf")) -> None:
        """Expect nothing for so long: the robot restarts, and holds itself."""
        self._reading_due, self._command_due = self.clock.now() + seconds, float("inf")

    @property
    def due(self) -> float:
        """When the patience ends, if nothing comes."""
        return min(self._reading_due, self._command_due)

    def send(self, command: Command) -> dict[str, float]:
        """Send a command; raise ``DampedError`` instead if it comes too late or the gate has
        closed.
        """
        self.check()
        with self._lock:
            if not self.reason:
                sent = self.robot.send_action(command)
                self.sent += 1
        if self.reason:
            self._limp()  # closed while the driver was at it: damping has the last word
            raise DampedError(self.reason)
        self._command_due = self.clock.now() + self.patience
        self._beat()
        return sent

    def check(self) -> None:
        """Damp if the patience has ended; raise ``DampedError`` if the robot is damped."""
        now = self.clock.now()
        if not self.reason and now > self.due:
            what = "no new reading" if now > self._reading_due else "no command went out"
            self.damp(f"{what} for {1e3 * self.patience:.0f} ms or more")
        if self.reason:
            raise DampedError(self.reason)

    def damp(self, reason: str, fault: bool = True) -> None:
        """Close the gate and make the robot limp; again is allowed, the first reason stays."""
        if not self.reason:
            self.reason, self.fault, self.damped_at = reason, fault, self.clock.now()
        held = self._lock.acquire(timeout=GRACE)
        try:
            self._limp()
        finally:
            if held:
                self._lock.release()

    def _limp(self) -> None:
        with suppress(
            BridgeError, OSError
        ):  # a link that is lost takes no damping: the robot's own watchdog must
            self.robot.damp()


class Watch:
    """The thread that watches a gate, and files for a sign to stop: descriptor -> reason, or none
    to go on.
    """

    def __init__(
        self, gate: Gate, signs: Iterable[tuple[int, Callable[[bytes], str]]] = ()
    ) -> None:
        self.gate, self._signs = gate, dict(signs)
        self.hung: Callable[[], None] = lambda: None
        """Called once when the loop has not noticed damping for ``hang`` seconds."""
        self.hang = 2.0
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        os.write(self._wake[1], b".")
        self._thread.join()
        for end in self._wake:
            os.close(end)

    def _run(self) -> None:
        """Sleep until the patience ends at the earliest, then look whether it has; once damped,
        damp on.
        """
        while not self.gate.reason:
            left = min(max(self.gate.due - self.gate.clock.now(), 0.0) + 1e-4, 0.05)
            if self._ended(left):
                return
            with suppress(DampedError):
                self.gate.check()
        told, begun = False, self.gate.clock.now()
        while not self._ended(AGAIN):
            self.gate.damp(self.gate.reason)
            if not (told or self.gate.noticed) and self.gate.clock.now() - begun > self.hang:
                told = True
                self.hung()

    def _ended(self, seconds: float) -> bool:
        """Wait; damp at a sign to stop; say whether the watch is over."""
        ready, _, _ = select.select([self._wake[0], *self._signs], [], [], seconds)
        for sign in ready:
            if sign == self._wake[0]:
                return True
            data = os.read(sign, 1024)
            if not data:
                del self._signs[sign]  # the terminal is gone
            elif why := self._signs[sign](data):
                self.gate.damp(why, fault=False)
        return False
