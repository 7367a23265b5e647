"""The controller's client of a simulated robot: it speaks UDP with a process on this machine.

This file has neither physics nor MuJoCo, only the connection. Its neighbours:

- ``metarobot.deploy.sim_robot_server`` is the process at the other end, which this client starts
  unless an address is given;
- ``metarobot.deploy.sim_robot_body`` is the robot inside that process;
- ``metarobot.sim`` holds the physics backends.

The frames are defined here, for both ends. All numbers are little-endian: a header (magic, kind,
number), then float64 values or JSON.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robots.lookup import shortened_list
from metarobot.bridge.tools.python_command import child_environment, python_command

HEADER = struct.Struct("<4sB3xQ")
"""Of a frame: magic, kind, three bytes of padding, number."""
MAGIC = b"mrs1"
MAX_FRAME_BYTES = 65000
HOST = "127.0.0.1"
ANSWER_TIMEOUT_S = 10.0
"""How long to wait for an answer, s."""
START_TIMEOUT_S = 60.0
"""How long to wait for the process to start, s: it compiles a model."""
READING_PATIENCE_PERIODS = 1.5
"""How many control periods to wait for a new reading."""
REPEAT_S = 0.05
"""Requests are repeated at this interval until they are answered, s."""


class FrameKind(IntEnum):
    """What a frame is. Its number counts commands, or readings, so that late ones are known."""

    HELLO = 1
    """A controller asks to drive the robot; answered by INFO (JSON), or by REFUSED (JSON) if there
    is another one."""
    INFO = 2
    COMMAND = 3
    """One float64 an element of the command, in the order of INFO's ``command``."""
    RESTART = 4
    """Number of the request, world, episode: the robot is put at that episode's start; readings
    carry the number of the request they follow."""
    DAMP = 5
    READING = 6
    """Stamp, number of the last command taken, number of the last restart, then the values in the
    order of INFO's ``reading``."""
    REPORT = 7
    """A request without payload, from any address; answered with JSON."""
    REFUSED = 8
    BYE = 9
    PASS = 10
    """In lock-step: let a control period pass without a command; numbered as commands are."""


def write_frame(kind: FrameKind, number: int, values: Any = None) -> bytes:
    """Return a frame's bytes; ``values`` are floats, or a dict that becomes JSON, or nothing."""
    header = HEADER.pack(MAGIC, kind, number)
    if values is None:
        return header
    if isinstance(values, dict):
        return header + json.dumps(values).encode()
    return header + np.asarray(values, "<f8").tobytes()


def parse_frame(data: bytes) -> tuple[FrameKind, int, bytes] | None:
    """Return a frame's kind, number and payload; None for bytes that are no frame."""
    if len(data) < HEADER.size:
        return None
    magic, kind, number = HEADER.unpack_from(data)
    if magic != MAGIC:
        return None
    try:
        return FrameKind(kind), number, data[HEADER.size :]
    except ValueError:
        return None


class SimRobotClient:
    """A robot in MuJoCo, driven in real time or in lock-step.

    In real time the robot's clock runs by itself. In lock-step it advances by one control period
    with each reading, as fast as both ends can. After ``restart`` the robot is held where the
    episode begins until the first command: its time starts with that.

    Args:
        meta: The policy's metadata: its family, and the joints or observations it needs.
        family: Task family of the robot; the policy's own if empty.
        split, tasks, seed, robot, lockstep, noise, watchdog_s, publish_hz: As in
            ``python -m metarobot.deploy.sim_robot_server --help``.
        task: One task of your own, as a mapping or as text, ``"friction=0.4,payload=2"``.
        address: ``host:port`` of a process that runs already; one is started if empty.
    """

    name = "sim"
    guarded = False  # the robot damps itself when commands stop

    def __init__(
        self,
        meta: PolicyMetadata,
        *,
        family: str = "",
        split: str = "test",
        tasks: int = 100,
        seed: int = 0,
        task: Mapping[str, float] | str = "",
        robot: str = "",
        lockstep: bool = False,
        noise: bool = True,
        watchdog_s: float = 0.1,
        publish_hz: float = 0.0,
        address: str = "",
    ) -> None:
        self.meta = meta
        self.address = address
        self.world = 0
        """Number of the task of the trial that the next ``restart`` begins."""

        arguments = [family or meta.family, "--split", split, "--until-eof"]
        arguments += ["--tasks", str(int(tasks)), "--seed", str(int(seed))]
        arguments += ["--watchdog-s", str(watchdog_s), "--publish-hz", str(publish_hz)]
        if isinstance(task, str):
            assignments = task.split(",")
        else:
            assignments = [f"{name}={value!r}" for name, value in task.items()]
        if task:
            arguments += ["--task", *assignments]
        if robot:
            arguments += ["--robot", robot]
        if lockstep:
            arguments += ["--lockstep"]
        if not noise:
            arguments += ["--no-noise"]
        self._arguments = arguments

        self.info: dict[str, Any] = {}
        """The content of the robot's INFO frame: family, names of the signals, rates, tasks."""
        self._report: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

        self._command_numbers = itertools.count(1)
        self._sent_number = 0
        """Number of the last command sent."""
        self._restart_number = 0
        """Number of the last restart asked for."""
        self._answered_command = 0
        self._answered_restart = 0
        """Numbers of the last command and restart that the newest reading answers."""
        self._latest: dict[str, float] = {}
        self._returned_seq = 0
        """``seq`` of the last reading that ``get_observation`` returned."""

    @property
    def identity(self) -> str:
        """Which robot it is; a process that this client starts is a robot of its own."""
        return f"sim:{self.address or id(self)}"

    def connect(self) -> None:
        """Start the process, unless an address was given, and wait for a first reading.

        Raises:
            BridgeError: The process does not start or answer, has another controller, or its robot
                lacks what the policy needs.
        """
        if self._socket is not None:
            return
        host, port = self._find_or_start()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((host, port))
        self._socket.setblocking(False)
        try:
            self._request(FrameKind.HELLO, lambda: bool(self.info))
            self._check_signals()
            self._request(None, lambda: bool(self._latest))
        except BridgeError:
            self.disconnect()
            raise

    def await_reading(self) -> None:
        """In real time, wait for a new reading, but not much longer than a control period."""
        self._receive_all()
        if not self.info["lockstep"] and self._latest["seq"] == self._returned_seq:
            self._wait_and_receive(READING_PATIENCE_PERIODS * self.info["control_s"])

    def get_observation(self) -> dict[str, float]:
        """Return the newest reading; in lock-step the one a control period after the last."""
        self._receive_all()
        if self.info["lockstep"]:
            returned_before = self._latest["seq"] == self._returned_seq
            if returned_before and self._answered_command >= self._sent_number:
                # no command is under way: let time pass without one
                self._sent_number = next(self._command_numbers)
                self._send(write_frame(FrameKind.PASS, self._sent_number))
            self._request(None, lambda: self._answered_command >= self._sent_number)
        self._returned_seq = int(self._latest["seq"])
        return self._latest

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        """Send a command, joint targets or an action, with all its elements; return it."""
        sent = {key: float(action[key]) for key in self.info["command"]}
        self._sent_number = next(self._command_numbers)
        self._send(write_frame(FrameKind.COMMAND, self._sent_number, list(sent.values())))
        return sent

    def restart(self, episode: int) -> None:
        """Put the robot where that episode of the trial begins, and hold it there."""
        self._restart_number += 1
        values = [self._restart_number, self.world, episode]
        self._request(
            FrameKind.RESTART, lambda: self._answered_restart == self._restart_number, values
        )

    def select_task(self, number: int) -> None:
        """Choose the task, by its number counted round, of the trial that ``restart`` begins."""
        self.world = number

    def damp(self) -> None:
        """Turn the drives' position gains off until the next restart."""
        # UDP may lose a frame, and nobody confirms this one
        for _ in range(3):
            self._send(write_frame(FrameKind.DAMP, 0))

    def report(self) -> dict[str, Any]:
        """Return what the robot counted: commands, delays, and the episode's true return."""
        self._report = {}
        self._request(FrameKind.REPORT, lambda: bool(self._report))
        return self._report

    def disconnect(self) -> None:
        """Release the robot; a process that this client started ends."""
        if self._socket is not None:
            self._send(write_frame(FrameKind.BYE, 0))
            self._socket.close()
            self._socket = None
        if self._process is not None:
            # the end of its standard input ends the process
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(ANSWER_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _find_or_start(self) -> tuple[str, int]:
        """Return host and port of the process; start it if no address was given."""
        if not self.address:
            return HOST, self._start()
        host, _, port = self.address.rpartition(":")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise BridgeError(
                f"{self.address!r} is not the address of a simulated robot: give host:port"
            )
        return host or HOST, int(port)

    def _start(self) -> int:
        """Start the process and return its port, which is the first line it prints."""
        command = python_command("metarobot.deploy.sim_robot_server", *self._arguments)
        self._process = subprocess.Popen(  # noqa: S603
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else b""
        if line.strip().isdigit():
            return int(line)

        self._process.kill()
        _, errors = self._process.communicate()
        self._process = None
        lines = errors.decode(errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else "?"
        raise BridgeError(f"the simulated robot does not start: {reason}")

    def _check_signals(self) -> None:
        """Raise if the robot's joints or observations are not those of the policy."""
        if self.info["legged"]:
            wanted = [f"{joint}.pos" for joint in self.meta.joint_names]
            available = self.info["command"]
        else:
            wanted = list(self.meta.observation_names)
            available = self.info["reading"][: len(wanted)]
        if wanted != list(available):
            raise BridgeError(
                f"the policy is for {shortened_list(wanted)}, the simulated {self.info['family']} "
                f"has {shortened_list(available)}"
            )

    def _send(self, data: bytes) -> None:
        """Send a frame without waiting; one that does not fit the socket's buffer is dropped."""
        if self._socket is None:
            return
        try:
            self._socket.send(data)
        except BlockingIOError:
            pass
        except OSError as e:
            kind = data[len(MAGIC)]
            if kind in (FrameKind.COMMAND, FrameKind.HELLO):
                raise BridgeError(f"the simulated robot is gone: {e.strerror}") from e

    def _request(
        self, kind: FrameKind | None, answered: Callable[[], bool], values: Any = None
    ) -> None:
        """Receive frames until ``answered`` is true; send the request, if any, repeatedly.

        Time in which this process was suspended does not count: the robot's was not either.
        """
        waited = 0.0
        next_request = 0.0
        while not answered():
            if waited >= ANSWER_TIMEOUT_S:
                raise BridgeError(
                    f"the simulated robot has not answered for {ANSWER_TIMEOUT_S:g} s"
                )
            if kind is not None and waited >= next_request:
                self._send(write_frame(kind, 0, values))
                next_request = waited + REPEAT_S
            began = time.monotonic()
            self._wait_and_receive(REPEAT_S)
            waited += min(time.monotonic() - began, REPEAT_S)

    def _wait_and_receive(self, timeout_s: float) -> None:
        """Wait for a frame, at most ``timeout_s``, and handle all there are."""
        select.select([self._connected_socket()], [], [], timeout_s)
        self._receive_all()

    def _connected_socket(self) -> socket.socket:
        if self._socket is None:
            raise BridgeError("the simulated robot is not connected")
        return self._socket

    def _receive_all(self) -> None:
        """Handle all frames that have arrived; of several readings only the newest."""
        connection = self._connected_socket()
        newest = None
        while True:
            try:
                frame = parse_frame(connection.recv(MAX_FRAME_BYTES))
            except BlockingIOError:
                break
            except OSError as e:
                raise BridgeError(f"the simulated robot is gone: {e.strerror}") from e
            if frame is None:
                continue

            kind, number, payload = frame
            if kind == FrameKind.READING:
                newest = number, payload
            elif kind == FrameKind.REFUSED:
                raise BridgeError(json.loads(payload)["reason"])
            elif kind == FrameKind.INFO:
                self.info = json.loads(payload)
            elif kind == FrameKind.REPORT:
                self._report = json.loads(payload)

        # the values cannot be named before INFO has come
        if newest is not None and self.info:
            self._keep_reading(*newest)

    def _keep_reading(self, number: int, payload: bytes) -> None:
        stamp, command, restart, *values = np.frombuffer(payload, "<f8").tolist()
        # a reading from before the restart that was asked for belongs to another episode
        if restart == self._restart_number:
            self._latest = {"stamp": stamp, "seq": float(number)}
            self._latest.update(zip(self.info["reading"], values, strict=True))
        self._answered_command = int(command)
        self._answered_restart = int(restart)
