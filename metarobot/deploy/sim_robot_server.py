"""The simulated robot's process: it runs a robot in real time and speaks UDP with its controller.

``python -m metarobot.deploy.sim_robot_server QuadrupedDamage`` prints the port on 127.0.0.1 that it
listens on. This file has the clock and the socket, and no physics. Its neighbours:

- ``metarobot.deploy.sim_robot_body`` is the robot that this process runs: physics and signals;
- ``metarobot.bridge.robots.sim_client`` is the controller's client of this process, and defines
  the frames for both ends;
- ``metarobot.sim`` holds the physics backends.

A command takes effect from the physics step in which it arrives. Without commands for
``watchdog_s`` the robot damps itself, whatever happened to its controller.
"""

from __future__ import annotations

import math
import os
import select
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from metarobot.bridge.robots.sim_client import (
    HOST,
    MAX_FRAME_BYTES,
    FrameKind,
    parse_frame,
    write_frame,
)
from metarobot.deploy.sim_robot_body import LeggedSignals, SimulatedRobot
from metarobot.errors import MetarobotError
from metarobot.tasks.family import family_on
from metarobot.tasks.space import parse_assignments

MAX_LATENESS_S = 0.05
"""How late the physics may be before simulated time stands still instead of catching up, s: the
machine was suspended or busy."""
LINGER_S = 2.0
"""How long the robot goes on after the process that started it has ended, s."""
OWNER_SILENCE_S = 1.0
"""After this time without a frame from its controller, a robot accepts another one, s."""
MAX_FRAMES_AT_ONCE = 1000
"""Frames read in one go before the physics continues."""

Address = tuple[str, int]


class SimRobotServer:
    """The process's loop: read frames, advance the physics, publish readings.

    Args:
        robot: The simulated robot.
        port: UDP port to listen on; 0 takes a free one.
        lockstep: Advance one control period a command, instead of with the clock.
        watchdog_s: Time without a command after which the robot damps itself, s.
        publish_hz: Readings a second; the control rate if 0.

    Raises:
        MetarobotError: A rate or watchdog out of range, or a port that is taken.
    """

    def __init__(
        self,
        robot: SimulatedRobot,
        *,
        port: int,
        lockstep: bool,
        watchdog_s: float,
        publish_hz: float,
    ) -> None:
        self.robot = robot
        self.lockstep = lockstep
        self.watchdog_s = watchdog_s
        self.physics_s = robot.env.dt / robot.family.substeps

        physics_hz = 1 / self.physics_s
        if not 0 <= publish_hz <= physics_hz + 1e-6:
            raise MetarobotError(
                f"publish_hz must be between 0 and the physics' {physics_hz:g}, not {publish_hz:g}"
            )
        if not (watchdog_s > 0 and math.isfinite(watchdog_s)):
            raise MetarobotError(f"watchdog_s must be above 0, not {watchdog_s:g}")

        # physics steps from one published reading to the next
        self._publish_every = robot.family.substeps
        if publish_hz and not lockstep:
            self._publish_every = max(1, round(physics_hz / publish_hz))

        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((HOST, port))
        except OSError as e:
            raise MetarobotError(f"port {port} of {HOST} cannot be had: {e.strerror}") from e
        except OverflowError as e:
            raise MetarobotError(f"port {port} of {HOST} cannot be had: {e}") from e
        self.port: int = self._socket.getsockname()[1]

        self.counts = {"commands": 0, "refused": 0, "foreign": 0, "readings": 0, "slips": 0}
        self._owner: Address | None = None
        """The controller that drives the robot."""
        self._owner_frame_time = 0.0
        self._command_time = 0.0
        """When the owner's last frame, and the last command, arrived."""
        self._longest_gap_s = 0.0
        self._damped_after_s = 0.0

        # counted in physics steps
        self._ticks = 0
        self._first_command_tick = 0
        self._ticks_since_command = 0

        # numbers of the last command and of the last restart request that were taken
        self._command_number = 0
        self._restart_number = 0

        self._held = True
        """Whether the robot is held at an episode's start until the first command."""
        self._end_time = math.inf

    def serve(self, *, until_eof: bool) -> None:
        """Run until ``stop``, or until standard input ends and the robot has come to rest."""
        self._stdin = [sys.stdin.fileno()] if until_eof else []
        due = time.monotonic()
        while time.monotonic() < self._end_time:
            if self.lockstep:
                self._receive(time.monotonic() + 0.1)
                continue

            due += self.physics_s
            was_held = self._held
            self._receive(due)

            now = time.monotonic()
            if now - due > MAX_LATENESS_S:
                self.counts["slips"] += not self._held
                due = now
            if was_held and not self._held:
                # the episode's time starts with its first command
                due = self._command_time
                continue
            self._tick()

    def stop(self) -> None:
        """End ``serve``, from another thread."""
        self._end_time = 0.0

    def info(self) -> dict[str, Any]:
        """Return the content of an INFO frame: family, names of the signals, rates, tasks."""
        family = self.robot.family
        signals = self.robot.signals
        return {
            "family": family.name,
            "legged": isinstance(signals, LeggedSignals),
            "reading": signals.reading,
            "command": signals.command,
            "control_s": self.robot.env.dt,
            "physics_s": self.physics_s,
            "horizon": family.horizon,
            "tasks": len(self.robot.tasks),
            "lockstep": self.lockstep,
            "watchdog_s": self.watchdog_s,
        }

    def report(self) -> dict[str, Any]:
        """Return the content of a REPORT frame: frame counts, times in s, and the true return."""
        return {
            **self.counts,
            "longest_gap_s": self._longest_gap_s,
            "damped_after_s": self._damped_after_s,
            "damped": self.robot.damped,
            "held": self._held,
            "told": self.robot.episode_summary(),
        }

    def _tick(self) -> None:
        """Let one physics step of time pass, and publish a reading if one is due."""
        self._ticks += 1
        self._ticks_since_command += 1
        if not self._held:
            if self._ticks_since_command * self.physics_s > self.watchdog_s:
                self._damp()
            self.robot.advance(1)

        if (self._ticks - self._first_command_tick) % self._publish_every == 0:
            self._publish()

    def _publish(self) -> None:
        """Send a reading to the owner, if there is one."""
        if self._owner is None:
            return
        self.counts["readings"] += 1
        stamp_s = self._ticks * self.physics_s
        head = [stamp_s, self._command_number, self._restart_number]
        values = [*head, *self.robot.reading()]
        self._send(FrameKind.READING, values, self._owner, self.counts["readings"])

    def _send(self, kind: FrameKind, values: Any, address: Address, number: int = 0) -> None:
        # a receiver that has ended is no error
        with suppress(OSError):
            self._socket.sendto(write_frame(kind, number, values), address)

    def _receive(self, until: float) -> None:
        """Handle frames until a time, s; if it has passed, those that are waiting."""
        for _ in range(MAX_FRAMES_AT_ONCE):
            left = until - time.monotonic()
            ready, _, _ = select.select([self._socket, *self._stdin], [], [], max(0.0, left))
            if not ready:
                return

            if self._socket in ready:
                try:
                    data, sender = self._socket.recvfrom(MAX_FRAME_BYTES)
                except ConnectionError:
                    # the receiver of an earlier frame of ours has ended
                    continue
                self._handle(data, sender)
                if self.lockstep:
                    return
            elif not os.read(self._stdin[0], 4096):
                # standard input has ended: so has whoever started this process
                self._stdin = []
                self._end_time = time.monotonic() + (0.0 if self.lockstep else LINGER_S)
                return

    def _handle(self, data: bytes, sender: Address) -> None:
        """Handle a frame from any address; only the owner may command."""
        frame = parse_frame(data)
        if frame is None:
            self.counts["refused"] += 1
            return
        kind, number, payload = frame

        if kind == FrameKind.REPORT:
            self._send(kind, self.report(), sender)
        elif kind == FrameKind.HELLO:
            self._accept_owner(sender)
        elif sender != self._owner:
            self.counts["foreign"] += 1
        else:
            self._owner_frame_time = time.monotonic()
            self._handle_owner(kind, number, payload)

    def _handle_owner(self, kind: FrameKind, number: int, payload: bytes) -> None:
        if kind == FrameKind.COMMAND:
            self._handle_command(number, payload)
        elif kind == FrameKind.PASS and number > self._command_number:
            self._pass_control_period(number)
        elif kind == FrameKind.RESTART:
            self._handle_restart(payload)
        elif kind == FrameKind.DAMP:
            self._damp()
        elif kind == FrameKind.BYE:
            self._owner = None

    def _accept_owner(self, sender: Address) -> None:
        """Accept a controller unless there is another; a new one counts from 0 again."""
        silence_s = time.monotonic() - self._owner_frame_time
        if self._owner not in (None, sender) and silence_s < OWNER_SILENCE_S:
            reason = f"the simulated robot at port {self.port} has a controller: one at a time"
            self._send(FrameKind.REFUSED, {"reason": reason}, sender)
            return

        if self._owner != sender:
            self._command_number = 0
            self._restart_number = 0
        self._owner = sender
        self._owner_frame_time = time.monotonic()
        self._send(FrameKind.INFO, self.info(), sender)
        self._publish()

    def _handle_command(self, number: int, payload: bytes) -> None:
        """Apply a command that is complete, finite and newer than the last.

        A refused one leaves the last command in force.
        """
        now = time.monotonic()
        if number <= self._command_number:
            self.counts["refused"] += 1
            return

        values = _floats(payload, len(self.robot.signals.command))
        if np.isfinite(values).all():
            self.counts["commands"] += 1
            if self._held:
                self._longest_gap_s = 0.0
                self._first_command_tick = self._ticks
            else:
                self._longest_gap_s = max(self._longest_gap_s, now - self._command_time)
            self.robot.command(values)
            self._command_time = now
            self._ticks_since_command = 0
            self._held = False
        else:
            self.counts["refused"] += 1
        self._pass_control_period(number)

    def _pass_control_period(self, number: int) -> None:
        """Note a command's number, and in lock-step let a control period pass.

        The reading that follows carries the number, so the controller knows what it answers.
        """
        self._command_number = number
        if self.lockstep:
            for _ in range(self.robot.family.substeps):
                self._tick()

    def _handle_restart(self, payload: bytes) -> None:
        """Put the robot at an episode's start and hold it; a repeated request is only answered."""
        request = _floats(payload, 3)
        if not np.isfinite(request).all():
            self.counts["refused"] += 1
            return

        number, world, episode = (int(x) for x in request)
        if number != self._restart_number:
            try:
                self.robot.restart(world, episode)
            except MetarobotError as e:
                assert self._owner is not None
                self._send(FrameKind.REFUSED, {"reason": str(e)}, self._owner)
                return
            self._restart_number = number
            self._held = True
            self._longest_gap_s = 0.0
            self._damped_after_s = 0.0
        self._publish()

    def _damp(self) -> None:
        if not self.robot.damped:
            self._damped_after_s = self._ticks_since_command * self.physics_s
            self._held = False
            self.robot.damp()


def _floats(payload: bytes, count: int) -> Any:
    """Return a frame's float64 values, or one NaN if their number is not ``count``."""
    if len(payload) != 8 * count:
        return np.array([math.nan])
    return np.frombuffer(payload, "<f8")


def serve(
    family: Positional[str],
    /,
    split: str = "test",
    tasks: int = 100,
    seed: int = 0,
    task: tuple[str, ...] = (),
    robot: str = "",
    lockstep: bool = False,
    noise: bool = True,
    watchdog_s: float = 0.1,
    publish_hz: float = 0.0,
    port: int = 0,
    until_eof: bool = False,
) -> None:
    """Run a simulated robot in real time, and print the port on 127.0.0.1 that it listens on.

    Args:
        family: Task family of the robot; ``metarobot families`` lists them.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks; the controller names one by its number, counted round.
        seed: Draws the tasks and the initial states, as an evaluation with this seed does.
        task: One task of your own instead, as name=value for each parameter.
        robot: Another model of the robot: a path to an MJCF, or menagerie:name.
        lockstep: Advance one control period a command, as fast as possible, instead of with the
            clock.
        noise: Whether sensors are as noisy as in training.
        watchdog_s: Time without a command after which the drives go limp, s.
        publish_hz: Readings a second; the control rate if 0, at most the physics rate.
        port: Port to listen on; 0 takes a free one.
        until_eof: End when standard input ends: the process that starts this one holds it open.
    """
    chosen = family_on(family, robot)
    if task:
        drawn = [chosen.space.task(**parse_assignments(task))]
    else:
        drawn = chosen.space.sample(split, tasks, seed)

    torch.set_num_threads(1)
    server = SimRobotServer(
        SimulatedRobot(chosen, drawn, seed=seed, noise=noise),
        port=port,
        lockstep=lockstep,
        watchdog_s=watchdog_s,
        publish_hz=publish_hz,
    )
    print(server.port, flush=True)
    server.serve(until_eof=until_eof)


def main() -> None:
    """Run the process; a user's mistake is one line on standard error and exit code 2."""
    try:
        tyro.cli(serve, prog="python -m metarobot.deploy.sim_robot_server")
    except MetarobotError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
