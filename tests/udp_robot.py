"""A robot of two joints over UDP: its driver, a controller process, and the robot's own end.

``python udp_robot.py FOLDER PORT FAULT`` runs a controller with a guard process. ``FAULT`` is what
its policy does wrong (``policy hangs``, ``policy nan``) or its driver (``damping raises``), or
empty.
"""

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import numpy as np
from bridging import JOINTS, PlainLayout, WavePolicy

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import MonotonicClock
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robots.lookup import exclusive_control
from metarobot.bridge.run_report import RunSettings
from metarobot.bridge.safety.command_gate import GateWatchdog
from metarobot.bridge.safety.emergency_stop import stop_signals
from metarobot.bridge.safety.guard_process import guard_process

READING_FRAME = struct.Struct("<cQd4d")
"""Kind, number, stamp, angles and velocities."""
COMMAND_FRAME = struct.Struct("<cQQ2d")
"""Kind, number, number of the reading that it answers, targets."""
HELLO = b"H"
READING = b"R"
COMMAND = b"C"
DAMP = b"D"
KEYS = [*(f"{joint}.pos" for joint in JOINTS), *(f"{joint}.vel" for joint in JOINTS)]
FAULTS = ("silence", "freeze", "nan", "older", "ahead", "jump", "out of range", "frozen values")
"""What the peer may do to its readings."""
POLICY_FAULT_STEP = 30
"""The step in which a policy goes wrong."""
DAMPING_FAILURES = 10
"""How often damping fails with the fault ``damping raises``."""


class UdpRobot:
    """The robot's driver; in a guard process it sends nothing but ``damp``."""

    name = "udp"
    guarded = True

    def __init__(self, meta: Any, *, port: int, guard: bool = False) -> None:
        self.identity = f"udp:{port}"
        self._guard = guard
        self._port = port
        self._number = 0
        self._latest: dict[str, float] = {}
        self._socket: socket.socket | None = None
        self.failures_left = 0
        """How often damping will still fail."""

    def connect(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect(("127.0.0.1", self._port))
        self._socket.setblocking(False)
        end = time.monotonic() + 10.0
        while not self._guard and not self._latest:
            self._socket.send(COMMAND_FRAME.pack(HELLO, 0, 0, 0, 0))
            time.sleep(0.02)
            self._receive()
            if time.monotonic() > end:
                raise BridgeError("no reading")

    def _receive(self) -> None:
        while True:
            try:
                data = self._socket.recv(1024)
            except BlockingIOError:
                return
            _, seq, stamp, *values = READING_FRAME.unpack(data)
            self._latest = {"stamp": stamp, "seq": float(seq)}
            self._latest |= dict(zip(KEYS, values, strict=True))

    def get_observation(self) -> dict[str, float]:
        self._receive()
        return dict(self._latest)

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        self._number += 1
        answered = int(self._latest["seq"])
        targets = [action[f"{joint}.pos"] for joint in JOINTS]
        self._socket.send(COMMAND_FRAME.pack(COMMAND, self._number, answered, *targets))
        return dict(action)

    def damp(self) -> None:
        if self.failures_left:
            self.failures_left -= 1
            raise RuntimeError("a bug in the driver")
        if self._socket is not None:
            self._socket.send(COMMAND_FRAME.pack(DAMP, 0, 0, 0, 0))

    def disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class ReceivedFrame(NamedTuple):
    """A frame that reached the robot."""

    time: float
    kind: bytes
    answered: int
    """Number of the reading that a command answers."""
    targets: np.ndarray


class SentReading(NamedTuple):
    """The true state at a reading."""

    time: float
    pos: np.ndarray
    vel: np.ndarray


class UdpPeer:
    """The robot's own end: publishes readings, follows its targets, and records what arrives."""

    def __init__(self, hz: float = 50.0) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.period_s = 1 / hz
        self.received: list[ReceivedFrame] = []
        self.readings: dict[int, SentReading] = {}
        """Number -> reading."""
        self.last_good_at = 0.0
        """Time at which the last good reading went out."""
        self.fault = ""
        """One of ``FAULTS``, from now on."""
        self._pos = np.array([0.3, 0.1])
        self._vel = np.zeros(2)
        self._target = np.array([0.3, 0.1])
        self._controller: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "UdpPeer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.socket.close()

    def _run(self) -> None:
        seq = 0
        due = time.monotonic()
        last_good = b""
        last_values = (0.0,) * 4
        while not self._over.is_set():
            due += self.period_s
            self._listen(due)

            self._vel = (self._target - self._pos) * 5
            self._pos = self._pos + self._vel * self.period_s
            seq += 1
            now = time.monotonic()
            self.readings[seq] = SentReading(now, self._pos.copy(), self._vel.copy())

            fault = self.fault
            # The robot's clock is ahead of the controller's
            stamp = now + 77.0
            pos = self._pos.copy()
            match fault:
                case "nan":
                    pos[0] = np.nan
                case "older":
                    stamp -= 5.0
                case "ahead":
                    stamp += 5.0
                case "jump":
                    pos[0] += -0.6 if pos[0] > 0 else 0.6
                case "out of range":
                    pos[1] = 1.3
            values = (*pos, *self._vel)
            if fault == "frozen values":
                values = last_values
            data = READING_FRAME.pack(READING, seq, stamp, *values)
            if fault == "freeze":
                data = last_good
            if self._controller is not None and fault != "silence":
                with suppress(OSError):
                    self.socket.sendto(data, self._controller)
            if not fault:
                last_good = data
                last_values = values
                self.last_good_at = now

    def _listen(self, until: float) -> None:
        while (left_s := until - time.monotonic()) > 0:
            self.socket.settimeout(left_s)
            with suppress(TimeoutError, ConnectionError):
                data, sender = self.socket.recvfrom(1024)
                kind, _, answered, *targets = COMMAND_FRAME.unpack(data)
                if kind == HELLO:
                    self._controller = sender
                    continue
                frame = ReceivedFrame(time.monotonic(), kind, answered, np.array(targets))
                self.received.append(frame)
                if kind == COMMAND:
                    self._target = frame.targets

    def commands(self) -> list[ReceivedFrame]:
        return [frame for frame in self.received if frame.kind == COMMAND]

    def first_damping_at(self, since: float) -> float:
        """Return when the first damping after ``since`` came; NaN if none has."""
        for frame in list(self.received):
            if frame.kind == DAMP and frame.time >= since:
                return frame.time
        return float("nan")


def control(folder: str, port: int, fault: str) -> int:
    """Drive the robot with a policy that may go wrong; return an exit code."""

    def act(policy: WavePolicy, obs: Any) -> Any:
        if len(policy.inputs) == POLICY_FAULT_STEP:
            if fault == "policy hangs":
                time.sleep(1000)
            if fault in ("policy nan", "damping raises"):
                return np.array([np.nan, 0.0])
        return np.sin(0.2 * len(policy.inputs) + np.arange(2))

    meta = PolicyMetadata.load(folder)
    robot = UdpRobot(meta, port=port)
    if fault == "damping raises":
        robot.failures_left = DAMPING_FAILURES
    settings = RunSettings(hz=50, seconds=30, ready_s=0.1, soft_s=0.1, damp_s=0.3)
    with ExitStack() as stack:
        stack.enter_context(exclusive_control(robot.identity))
        robot.connect()
        guard = guard_process(folder, "udp_robot:UdpRobot", {"port": port}, 0.02)
        heartbeat = stack.enter_context(guard)
        stop = stack.enter_context(stop_signals())
        controller = Controller(
            WavePolicy(meta, act=act),
            robot,
            PlainLayout(meta),
            settings,
            clock=MonotonicClock(),
            heartbeat=heartbeat,
        )
        watchdog = stack.enter_context(GateWatchdog(controller.gate, stop.sources))
        watchdog.on_loop_hung = lambda: os._exit(1)
        watchdog.loop_hung_s = 0.5
        print("driving", flush=True)
        report = controller.run()
        print(report.reason, flush=True)
        return 1 if report.fault else 0


if __name__ == "__main__":
    try:
        sys.exit(control(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    except BridgeError as e:
        print(f"error: {e}", flush=True)
        sys.exit(2)
