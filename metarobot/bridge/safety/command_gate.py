"""Command gate: the only way from the controller to the robot. Once closed, it stays closed.

The gate decides *whether* a command goes out; ``command_limits`` has decided *which* before. Two
things keep it open: new readings, and commands that are sent. Each must follow the one before
within

    patience = 2 Δt + 10 ms,   Δt the control period.

Otherwise the robot is damped, whatever the control loop is doing: waiting for a policy that never
returns, for a driver, or for a lost connection. ``GateWatchdog`` is the thread that sees to it.

On the wire this gives two bounds (``damping_bounds_s``), 10 ms of each for threads that wake late:

    last command      -> damping:  2 Δt + 20 ms
    last good reading -> damping:  3 Δt + 20 ms, as a reading may lie one period until it is read.

Damping may fail: a driver may raise anything, once or for ever. No exception of a driver leaves
``CommandGate.damp`` or ends the watchdog's thread, and damping is repeated until it has succeeded,
or until somebody says to give up (``CommandGate.give_up``).
"""

from __future__ import annotations

import math
import os
import select
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import LoopClock
from metarobot.bridge.robot_interface import Command, Robot

PATIENCE_MARGIN_S = 0.01
"""Added to two control periods: a tick that is a few milliseconds late is no reason to damp."""
WIRE_MARGIN_S = 0.02
"""Margin of the stated bounds: ``PATIENCE_MARGIN_S``, and 10 ms for a thread that wakes late."""
SEND_GRACE_S = 2e-3
"""How long damping waits for a command that is being sent, so as to arrive after it.

A driver that hangs while it sends must not hold damping up, so the wait is short."""
DAMPING_REPEAT_S = 0.02
"""Interval at which damping is sent again: a single packet may get lost."""
WATCHDOG_LONGEST_SLEEP_S = 0.05
"""The watchdog looks at least this often, because the gate's deadlines may move meanwhile."""
WATCHDOG_AFTER_DEADLINE_S = 1e-4
"""The watchdog wakes so long after the deadline: a wake-up just before it would be useless."""


STOP_AGAIN_S = 1.0
"""A stop so long after the first damping means: give up a robot that cannot be damped.

Earlier ones are a key that repeats, or the same Ctrl-C by another way."""


class DampedError(BridgeError):
    """The robot has been damped; the message says why."""


def patience_s(period_s: float) -> float:
    """Return how long the gate waits for the next reading or command, s: 2 Δt + 10 ms.

    One period is the normal interval; the second allows for one lost reading or one skipped tick.
    """
    return 2 * period_s + PATIENCE_MARGIN_S


def damping_bounds_s(period_s: float) -> tuple[float, float]:
    """Return the latest damping after the last good reading, and after the last command, s.

    Both are measured on the wire: (3 Δt + 20 ms, 2 Δt + 20 ms).
    """
    after_reading_s = 3 * period_s + WIRE_MARGIN_S
    after_command_s = 2 * period_s + WIRE_MARGIN_S
    return after_reading_s, after_command_s


class CommandGate:
    """Send commands while all is well, and damping once it is not; never a command after damping.

    Args:
        robot: Robot to command.
        clock: Time of the control loop.
        period_s: Control period.
        heartbeat: Called after every command that was sent: it tells the guard process that this
            process is alive.
    """

    def __init__(
        self,
        robot: Robot,
        clock: LoopClock,
        period_s: float,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.robot = robot
        self.clock = clock
        self.patience_s = patience_s(period_s)
        self.reason = ""
        """Why the robot was damped; empty while the gate is open."""
        self.fault = True
        """Whether damping was caused by a fault, not by an operator."""
        self.damped_at = math.nan
        """Time of the first damping, s."""
        self.loop_noticed = False
        """Whether the control loop has returned and knows of the damping."""
        self.damping_arrived = False
        """Whether the driver has taken a damping command without an error."""
        self.damping_failures = 0
        """How often the driver failed to damp."""
        self.damping_error = ""
        """Why it failed the last time."""
        self.give_up = False
        """Whether somebody has said not to try any longer to damp a robot that cannot be."""
        self.sent = 0
        """Number of commands sent."""
        self._heartbeat = heartbeat
        # Held while the driver sends a command
        self._send_lock = threading.Lock()
        self._reading_due = math.inf
        self._command_due = math.inf

    def note_new_reading(self) -> None:
        """Note that a new reading came: the next one is due after the patience."""
        self._reading_due = self.clock.now() + self.patience_s

    def expect_commands(self, expected: bool) -> None:
        """Say whether commands must follow from now on, or the robot holds itself."""
        self._command_due = self.clock.now() + self.patience_s if expected else math.inf

    def pause(self, seconds: float = math.inf) -> None:
        """Expect no reading and no command for so long: the robot restarts and holds itself."""
        self._reading_due = self.clock.now() + seconds
        self._command_due = math.inf

    @property
    def due(self) -> float:
        """Time at which the gate closes if neither a reading nor a command comes, s."""
        return min(self._reading_due, self._command_due)

    def send(self, command: Command) -> dict[str, float]:
        """Send a command; return what the driver really sent.

        Raises:
            DampedError: it comes too late, or the gate has closed. The command was not sent, or
                damping was sent after it.
        """
        self.check()

        # Look again under the lock: the watchdog may have closed the gate since ``check``
        with self._send_lock:
            if not self.reason:
                sent = self.robot.send_action(command)
                self.sent += 1

        # The gate may have closed while the driver was sending, and damping waits for a driver only
        # for ``SEND_GRACE_S``. Damping once more makes sure that it has the last word.
        if self.reason:
            self._damp_robot()
            raise DampedError(self.reason)

        self._command_due = self.clock.now() + self.patience_s
        self._heartbeat()
        return sent

    def beat(self) -> None:
        """Tell the guard process that this process is alive, although it sends no command.

        Raises:
            BridgeError: the guard process is not alive.
        """
        self._heartbeat()

    def check(self) -> None:
        """Close the gate if a reading or command is overdue.

        Raises:
            DampedError: the gate is closed.
        """
        now = self.clock.now()
        if not self.reason and now > self.due:
            missing = "no new reading" if now > self._reading_due else "no command went out"
            self.damp(f"{missing} for {1e3 * self.patience_s:.0f} ms or more")
        if self.reason:
            raise DampedError(self.reason)

    def damp(self, reason: str, fault: bool = True) -> None:
        """Close the gate and damp the robot. May be called again; the first reason stays."""
        # Close before waiting for the lock, so that no further command can start
        if not self.reason:
            self.reason = reason
            self.fault = fault
            self.damped_at = self.clock.now()

        # Damp with or without the lock: a driver that hangs must not prevent it
        locked = self._send_lock.acquire(timeout=SEND_GRACE_S)
        try:
            self._damp_robot()
        finally:
            if locked:
                self._send_lock.release()

    def stop(self, reason: str) -> None:
        """Damp because an operator asks for it; asked again later, give up what cannot be damped.

        See ``STOP_AGAIN_S``; a robot that has taken damping is damped in any case.
        """
        if self.reason and self.clock.now() - self.damped_at > STOP_AGAIN_S:
            self.give_up = True
        self.damp(reason, fault=False)

    def _damp_robot(self) -> None:
        # Over a lost connection no damping arrives: only the robot's own watchdog helps then.
        # Whatever a driver raises, the caller must go on and try again.
        try:
            self.robot.damp()
        except Exception as e:
            self.damping_failures += 1
            self.damping_error = str(e) or type(e).__name__
        else:
            self.damping_arrived = True


class GateWatchdog:
    """Thread that closes a gate in time, and reads the sources of an emergency stop.

    Use it as a context manager around the control loop.

    Args:
        gate: Gate to watch.
        stop_sources: File descriptor -> function from the bytes read there to a reason to stop, or
            to an empty string (``metarobot.bridge.safety.emergency_stop``).
    """

    def __init__(
        self,
        gate: CommandGate,
        stop_sources: Iterable[tuple[int, Callable[[bytes], str]]] = (),
    ) -> None:
        self.gate = gate
        self.on_loop_hung: Callable[[], None] = lambda: None
        """Called once when the loop has not noticed damping within ``loop_hung_s``."""
        self.loop_hung_s = 2.0
        self._stop_sources = dict(stop_sources)
        # A byte in this pipe ends the thread at once, instead of after its sleep
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name="gate watchdog", daemon=True)

    def __enter__(self) -> GateWatchdog:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        os.write(self._wake_writer, b".")
        self._thread.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _run(self) -> None:
        """Watch until told to end; an error in here must not end the thread."""
        reported = False
        while True:
            try:
                if self._wait(self._sleep_s()):
                    return
                if not self.gate.reason:
                    with suppress(DampedError):
                        self.gate.check()
                    continue

                # Closed gate: keep damping, and report a loop that does not come back
                self.gate.damp(self.gate.reason)
                damped_for_s = self.gate.clock.now() - self.gate.damped_at
                hung = not self.gate.loop_noticed and damped_for_s > self.loop_hung_s
                if hung and not reported:
                    reported = True
                    self.on_loop_hung()
            except Exception as e:
                # Without a watchdog nobody would notice a loop that hangs. A source of stops that
                # cannot be read would fail again at once, so none is read any more.
                self._stop_sources.clear()
                self.gate.damp(f"the watchdog failed: {str(e) or type(e).__name__}")

    def _sleep_s(self) -> float:
        """Return how long to sleep: until the gate may have to close, or to damp once more."""
        if self.gate.reason:
            return DAMPING_REPEAT_S
        left_s = max(self.gate.due - self.gate.clock.now(), 0.0)
        return min(left_s + WATCHDOG_AFTER_DEADLINE_S, WATCHDOG_LONGEST_SLEEP_S)

    def _wait(self, seconds: float) -> bool:
        """Wait; damp if a stop source says so. Return true when the watchdog is to end."""
        files = [self._wake_reader, *self._stop_sources]
        ready, _, _ = select.select(files, [], [], seconds)
        for file in ready:
            if file == self._wake_reader:
                return True
            try:
                data = os.read(file, 1024)
            except OSError:
                # A terminal that was hung up
                data = b""
            if not data:
                # End of file: the terminal is gone, and would be ready for ever
                del self._stop_sources[file]
                continue
            reason = self._stop_sources[file](data)
            if reason:
                self.gate.stop(reason)
        return False
