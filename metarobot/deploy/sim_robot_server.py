"""A simulated robot in real time: a process with MuJoCo in it that publishes readings and obeys
commands over UDP.

``python -m metarobot.deploy.sim_robot_server QuadrupedDamage`` prints the port on 127.0.0.1 it
listens at; the frames are those of ``metarobot.bridge.robots.sim_client``, which is the
controller's end, the robot is ``metarobot.deploy.sim_robot_body``. A command acts from the physics
step in which it arrives.
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

from metarobot.bridge.robots.sim_client import HOST, LARGEST, Kind, frame, parse
from metarobot.deploy.sim_robot_body import LeggedSignals, SimulatedRobot
from metarobot.errors import MetarobotError
from metarobot.tasks.family import family_on
from metarobot.tasks.space import parse_assignments

SLIP = 0.05
"""How late the physics may be before its time stands still instead of catching up, s: the machine
was asleep."""
LINGER = 2.0
"""How long the robot goes on after whoever started it is gone, s."""
SILENT = 1.0
"""After so long without a word from its controller a robot takes another, s."""


class SimRobotServer:
    """The process's loop: frames in, physics on, readings out."""

    def __init__(
        self,
        world: SimulatedRobot,
        *,
        port: int,
        lockstep: bool,
        watchdog_s: float,
        publish_hz: float,
    ) -> None:
        self.world, self.lockstep, self.watchdog_s = world, lockstep, watchdog_s
        self.period = world.env.dt / world.family.substeps
        physics = 1 / self.period
        if not 0 <= publish_hz <= physics + 1e-6:
            raise MetarobotError(
                f"publish_hz must be between 0 and the physics' {physics:g}, not {publish_hz:g}"
            )
        if not (watchdog_s > 0 and math.isfinite(watchdog_s)):
            raise MetarobotError(f"watchdog_s must be above 0, not {watchdog_s:g}")
        self._every = (
            max(1, round(physics / publish_hz))
            if publish_hz and not lockstep
            else world.family.substeps
        )
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((HOST, port))
        except (OSError, OverflowError) as e:
            raise MetarobotError(
                f"port {port} of {HOST} cannot be had: {getattr(e, 'strerror', e)}"
            ) from e
        self.port: int = self._socket.getsockname()[1]
        self._owner: tuple[str, int] | None = None
        self._spoke = self._heard = 0.0
        self.counts = {"commands": 0, "refused": 0, "foreign": 0, "readings": 0, "slips": 0}
        self._gap = self._limp_after = 0.0
        self._ticks = self._began = self._silence = self._command = self._restart = 0
        self._held, self._end = True, math.inf

    def serve(self, *, until_eof: bool) -> None:
        """Run until whoever started the process is gone, and the robot has come to rest."""
        self._stdin = [sys.stdin.fileno()] if until_eof else []
        due = time.monotonic()
        while time.monotonic() < self._end:
            if self.lockstep:
                self._listen(time.monotonic() + 0.1)
                continue
            due += self.period
            held = self._held
            self._listen(due)
            now = time.monotonic()
            if now - due > SLIP:
                self.counts["slips"] += not self._held
                due = now
            if held and not self._held:  # the first command: the episode's time starts with it
                due = self._heard
                continue
            self._tick()

    def stop(self) -> None:
        """End ``serve``, from another thread."""
        self._end = 0.0

    def info(self) -> dict[str, Any]:
        """Say what robot this is."""
        family, signals = self.world.family, self.world.signals
        return {
            "family": family.name,
            "legged": isinstance(signals, LeggedSignals),
            "reading": signals.reading,
            "command": signals.command,
            "control_s": self.world.env.dt,
            "physics_s": self.period,
            "horizon": family.horizon,
            "tasks": len(self.world.tasks),
            "lockstep": self.lockstep,
            "watchdog_s": self.watchdog_s,
        }

    def report(self) -> dict[str, Any]:
        """Say what was counted; times in s."""
        timing = {
            "longest_gap_s": self._gap,
            "damped_after_s": self._limp_after,
            "damped": self.world.damped,
        }
        return {**self.counts, **timing, "held": self._held, "told": self.world.told()}

    def _tick(self) -> None:
        """Let one physics step of time pass."""
        self._ticks, self._silence = self._ticks + 1, self._silence + 1
        if not self._held:
            if self._silence * self.period > self.watchdog_s:
                self._damp()
            self.world.advance(1)
        if (self._ticks - self._began) % self._every == 0:
            self._publish()

    def _publish(self) -> None:
        if self._owner is not None:
            self.counts["readings"] += 1
            head = [self._ticks * self.period, self._command, self._restart]
            self._answer(
                Kind.READING, [*head, *self.world.reading()], self._owner, self.counts["readings"]
            )

    def _answer(self, kind: Kind, values: Any, to: tuple[str, int], number: int = 0) -> None:
        with suppress(OSError):  # whoever it was for is gone
            self._socket.sendto(frame(kind, number, values), to)

    def _listen(self, until: float) -> None:
        """Take frames in until a moment; all that are there even if it is past, up to a
        thousand.
        """
        for _ in range(1000):
            left = until - time.monotonic()
            ready, _, _ = select.select([self._socket, *self._stdin], [], [], max(0.0, left))
            if not ready:
                return
            if self._socket in ready:
                try:
                    data, sender = self._socket.recvfrom(LARGEST)
                except ConnectionError:  # an answer of ours found nobody
                    continue
                self._take(data, sender)
                if self.lockstep:
                    return
            elif not os.read(self._stdin[0], 4096):
                self._stdin, self._end = [], time.monotonic() + (0.0 if self.lockstep else LINGER)
                return

    def _take(self, data: bytes, sender: tuple[str, int]) -> None:
        parsed = parse(data)
        if parsed is None:
            self.counts["refused"] += 1
            return
        kind, number, payload = parsed
        if kind == Kind.REPORT:
            self._answer(kind, self.report(), sender)
        elif kind == Kind.HELLO:
            self._welcome(sender)
        elif sender != self._owner:
            self.counts["foreign"] += 1
        else:
            self._spoke = time.monotonic()
            self._serve_owner(kind, number, payload)

    def _serve_owner(self, kind: Kind, number: int, payload: bytes) -> None:
        if kind == Kind.COMMAND:
            self._obey(number, payload)
        elif kind == Kind.PASS and number > self._command:
            self._pass(number)
        elif kind == Kind.RESTART:
            self._begin(payload)
        elif kind == Kind.DAMP:
            self._damp()
        elif kind == Kind.BYE:
            self._owner = None

    def _welcome(self, sender: tuple[str, int]) -> None:
        """Take a controller on, unless there is another; its count of commands and restarts begins
        anew.
        """
        if self._owner not in (None, sender) and time.monotonic() - self._spoke < SILENT:
            reason = f"the simulated robot at port {self.port} has a controller: one at a time"
            self._answer(Kind.REFUSED, {"reason": reason}, sender)
            return
        if self._owner != sender:
            self._command = self._restart = 0
        self._owner, self._spoke = sender, time.monotonic()
        self._answer(Kind.INFO, self.info(), sender)
        self._publish()

    def _obey(self, number: int, payload: bytes) -> None:
        """Take a command, if it is whole, finite and newer than the last; a refused one leaves the
        last in force.
        """
        now = time.monotonic()
        if number <= self._command:
            self.counts["refused"] += 1
            return
        whole = len(payload) == 8 * len(self.world.signals.command)
        values = np.frombuffer(payload, "<f8") if whole else np.array([math.nan])
        if np.isfinite(values).all():
            self.counts["commands"] += 1
            self._gap = 0.0 if self._held else max(self._gap, now - self._heard)
            self._began = self._ticks if self._held else self._began
            self.world.command(values)
            self._heard, self._silence, self._held = now, 0, False
        else:
            self.counts["refused"] += 1
        self._pass(number)

    def _pass(self, number: int) -> None:
        """In lock-step, let a control period pass; its reading says which command, or request, it
        answers.
        """
        self._command = number
        if self.lockstep:
            for _ in range(self.world.family.substeps):
                self._tick()

    def _begin(self, payload: bytes) -> None:
        """Put the robot at a start and hold it there; a request that is repeated is answered
        again.
        """
        asked = np.frombuffer(payload, "<f8") if len(payload) == 24 else np.array([math.nan])
        if not np.isfinite(asked).all():
            self.counts["refused"] += 1
            return
        number, world, episode = (int(x) for x in asked)
        if number != self._restart:
            try:
                self.world.restart(world, episode)
            except MetarobotError as e:
                assert self._owner is not None
                self._answer(Kind.REFUSED, {"reason": str(e)}, self._owner)
                return
            self._restart, self._held, self._gap, self._limp_after = number, True, 0.0, 0.0
        self._publish()

    def _damp(self) -> None:
        if not self.world.damped:
            self._limp_after, self._held = self._silence * self.period, False
            self.world.damp()


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
    """Run a simulated robot in real time; prints the port on 127.0.0.1 it listens at.

    Args:
        family: Task family it belongs to; ``metarobot families`` lists them.
        split: Tasks to draw: train, test, interpolate or extrapolate, as the family has them.
        tasks: Number of tasks; the controller says which it wants, and begins again after the last.
        seed: Draws the tasks and the starts, as an evaluation with this seed does.
        task: One task of your own instead, as name=value for each parameter.
        robot: Another model of the robot: a path to an MJCF, or menagerie:name.
        lockstep: Let time go on by one control period a command, as fast as that goes, instead of
            by the clock.
        noise: Let sensors be as noisy as in training.
        watchdog_s: After so long without a command the drives go limp, s.
        publish_hz: Readings a second; the control rate if 0, at most the physics rate.
        port: Port to listen at; 0 takes a free one.
        until_eof: End when standard input ends: whoever starts the process holds it open.
    """
    chosen = family_on(family, robot)
    drawn = (
        [chosen.space.task(**parse_assignments(task))]
        if task
        else chosen.space.sample(split, tasks, seed)
    )
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
