"""A robot of two joints at the other end of a wire: its client, its controller process, and the
peer that records.

``python udp_robot.py FOLDER PORT HOW`` is a controller with a guard; ``HOW`` says what its policy
does wrong.
"""

import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from bridging import JOINTS, Plain, Wave

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import MonotonicClock
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robots.lookup import exclusive_control
from metarobot.bridge.run_report import RunSettings
from metarobot.bridge.safety.command_gate import GateWatchdog
from metarobot.bridge.safety.emergency_stop import stop_signals
from metarobot.bridge.safety.guard_process import guard_process

READING = struct.Struct("<cQd4d")
COMMAND = struct.Struct("<cQQ2d")
KEYS = [*(f"{j}.pos" for j in JOINTS), *(f"{j}.vel" for j in JOINTS)]
FAULTS = ("silence", "freeze", "nan", "older", "ahead")
"""What the peer may do to its readings."""


class Udp:
    """The client; a guard beside a controller says nothing but ``damp``."""

    name, guarded = "udp", True

    def __init__(self, meta: Any, *, port: int, guard: bool = False) -> None:
        self.identity, self._guard, self._number = f"udp:{port}", guard, 0
        self._port, self._latest = port, {}
        self._link: socket.socket | None = None

    def connect(self) -> None:
        self._link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._link.connect(("127.0.0.1", self._port))
        self._link.setblocking(False)
        end = time.monotonic() + 10.0
        while not self._guard and not self._latest:
            self._link.send(COMMAND.pack(b"H", 0, 0, 0, 0))
            time.sleep(0.02)
            self._drain()
            if time.monotonic() > end:
                raise BridgeError("no reading")

    def _drain(self) -> None:
        while True:
            try:
                data = self._link.recv(1024)
            except BlockingIOError:
                return
            _, seq, stamp, *values = READING.unpack(data)
            self._latest = {"stamp": stamp, "seq": float(seq)} | dict(
                zip(KEYS, values, strict=True)
            )

    def get_observation(self) -> dict[str, float]:
        self._drain()
        return dict(self._latest)

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        self._number += 1
        self._link.send(
            COMMAND.pack(
                b"C", self._number, int(self._latest["seq"]), *(action[f"{j}.pos"] for j in JOINTS)
            )
        )
        return dict(action)

    def damp(self) -> None:
        if self._link is not None:
            self._link.send(COMMAND.pack(b"D", 0, 0, 0, 0))

    def disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class Peer:
    """The robot: publishes readings, follows its targets, and writes down what arrives and when."""

    def __init__(self, hz: float = 50.0) -> None:
        self.link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.link.bind(("127.0.0.1", 0))
        self.port, self.period = self.link.getsockname()[1], 1 / hz
        self.heard: list[tuple[float, bytes, int, np.ndarray]] = []
        """When, kind, the reading that a command answers, targets."""
        self.readings: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}
        self.good = 0.0
        """When the last good reading went out."""
        self.fault = ""
        self._pos, self._vel, self._target = np.array([0.3, 0.1]), np.zeros(2), np.array([0.3, 0.1])
        self._to: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Peer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.link.close()

    def _run(self) -> None:
        seq, due, frozen = 0, time.monotonic(), b""
        while not self._over.is_set():
            due += self.period
            self._listen(due)
            self._vel = (self._target - self._pos) * 5
            self._pos = self._pos + self._vel * self.period
            seq, now = seq + 1, time.monotonic()
            self.readings[seq] = now, self._pos.copy(), self._vel.copy()
            stamp, pos = now + 77.0, self._pos.copy()
            match self.fault:
                case "nan":
                    pos[0] = np.nan
                case "older":
                    stamp -= 5.0
                case "ahead":
                    stamp += 5.0
            data = READING.pack(b"R", seq, stamp, *pos, *self._vel)
            data = frozen if self.fault == "freeze" else data
            if self._to is not None and self.fault != "silence":
                with suppress(OSError):
                    self.link.sendto(data, self._to)
            if not self.fault:
                frozen, self.good = data, now

    def _listen(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            self.link.settimeout(left)
            with suppress(TimeoutError, ConnectionError):
                data, sender = self.link.recvfrom(1024)
                kind, _, answered, *targets = COMMAND.unpack(data)
                if kind == b"H":
                    self._to = sender
                    continue
                self.heard.append((time.monotonic(), kind, answered, np.array(targets)))
                if kind == b"C":
                    self._target = np.array(targets)

    def commands(self) -> list[tuple[float, bytes, int, np.ndarray]]:
        return [x for x in self.heard if x[1] == b"C"]

    def damped(self, since: float) -> float:
        """Return when the first damping after a moment came; NaN if none has."""
        return next(
            (t for t, kind, _, _ in list(self.heard) if kind == b"D" and t >= since), float("nan")
        )


def control(folder: str, port: int, how: str) -> int:
    """Drive the robot; a policy may go wrong at its 30th step."""

    def act(policy: Wave, obs: Any) -> Any:
        if how == "policy hangs" and len(policy.told) == 30:
            time.sleep(1000)
        if how == "policy nan" and len(policy.told) == 30:
            return np.array([np.nan, 0.0])
        return np.sin(0.2 * len(policy.told) + np.arange(2))

    about = PolicyMetadata.load(folder)
    robot, settings = (
        Udp(about, port=port),
        RunSettings(hz=50, seconds=30, ready_s=0.1, soft_s=0.1, damp_s=0.3),
    )
    with ExitStack() as stack:
        stack.enter_context(exclusive_control(robot.identity))
        robot.connect()
        heartbeat = stack.enter_context(
            guard_process(folder, "udp_robot:Udp", {"port": port}, 0.02)
        )
        stop = stack.enter_context(stop_signals())
        one = Controller(
            Wave(about, act=act),
            robot,
            Plain(about),
            settings,
            clock=MonotonicClock(),
            heartbeat=heartbeat,
        )
        watchdog = stack.enter_context(GateWatchdog(one.gate, stop.sources))
        watchdog.on_loop_hung = lambda: __import__("os")._exit(1)
        watchdog.loop_hung_s = 0.5
        print("driving", flush=True)
        report = one.run()
        print(report.reason, flush=True)
        return 1 if report.fault else 0


if __name__ == "__main__":
    try:
        sys.exit(control(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    except BridgeError as e:
        print(f"error: {e}", flush=True)
        sys.exit(2)
