"""The simulated robot as the controller sees it: a process of its own that answers over UDP on this
machine.

The frames are defined here, for both ends. All numbers are little-endian: a header (magic, kind,
number), then float64s or JSON. The process is ``metarobot.deploy.sim_robot_server``; started by
this client unless an address is given.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from metarobot.bridge.errors import BridgeError

HEAD = struct.Struct("<4sB3xQ")
MAGIC = b"mrs1"
LARGEST = 65000
HOST = "127.0.0.1"
TIMEOUT, START = 10.0, 60.0
"""How long to wait for an answer, and for the process to come up, s: it compiles a model."""
WAIT = 1.5
"""How many control periods to wait for a reading that was not handed out before."""
AGAIN = 0.05
"""Requests are repeated so often until they are answered, s."""


class Kind(IntEnum):
    """What a frame is. Its number counts commands, or readings, so that late ones are known."""

    HELLO = 1
    """A controller asks to drive the robot; answered by INFO (JSON), or REFUSED (JSON) if another
    one does."""
    INFO = 2
    COMMAND = 3
    """One float64 an element of the action, in the order INFO names them."""
    RESTART = 4
    """Number of the request, world, episode: the robot is put at that start; readings say which
    request they follow."""
    DAMP = 5
    READING = 6
    """Stamp, number of the last command taken, number of the last restart, then the values in
    INFO's order."""
    REPORT = 7
    """Asked without payload, from any address; answered with JSON."""
    REFUSED = 8
    BYE = 9
    PASS = 10
    """In lock-step: let a control period pass without a command; numbered as commands are."""


def frame(kind: Kind, number: int, values: Any = None) -> bytes:
    """Write a frame: ``values`` float64s, or anything JSON holds if it is a dict."""
    head = HEAD.pack(MAGIC, kind, number)
    if values is None:
        return head
    return head + (
        json.dumps(values).encode()
        if isinstance(values, dict)
        else np.asarray(values, "<f8").tobytes()
    )


def parse(data: bytes) -> tuple[Kind, int, bytes] | None:
    """Read a frame: kind, number and payload; None if it is none of ours."""
    if len(data) < HEAD.size:
        return None
    magic, kind, number = HEAD.unpack_from(data)
    if magic != MAGIC or kind not in Kind._value2member_map_:
        return None
    return Kind(kind), number, data[HEAD.size :]


class Sim:
    """A robot in MuJoCo, in real time or in lock-step: then its time goes on by one control period
    a reading.

    After ``restart`` it is held where the episode begins until the first command: its time starts
    with that. In real time ``await_reading`` is for controllers that would keep step with it,
    whatever their phase. Settings are those of ``python -m metarobot.deploy.sim_robot_server``;
    ``task`` may be words, ``a=1,b=2``.
    """

    name = "sim"
    guarded = False  # it damps itself when commands stop

    def __init__(
        self,
        meta: Any,
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
        self.meta, self.address, self.world = meta, address, 0
        words = (
            task.split(",") if isinstance(task, str) else [f"{k}={v!r}" for k, v in task.items()]
        )
        numbers = {
            "tasks": int(tasks),
            "seed": int(seed),
            "watchdog-s": watchdog_s,
            "publish-hz": publish_hz,
        }
        self._arguments = [
            *(family or meta.family, "--split", split, "--until-eof"),
            *(word for name, x in numbers.items() for word in (f"--{name}", str(x))),
            *(("--task", *words) if task else ()),
            *(("--robot", robot) if robot else ()),
            *(("--lockstep",) if lockstep else ()),
            *(() if noise else ("--no-noise",)),
        ]
        self.info: dict[str, Any] = {}
        """What the robot says of itself: family, keys, rates, tasks."""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._sent = self._restarts = self._seen = 0
        self._latest: dict[str, float] = {}
        self._answers = (0, 0)

    @property
    def identity(self) -> str:
        """Say which robot it is: a process of this client's own is its own robot."""
        return f"sim:{self.address or id(self)}"

    def connect(self) -> None:
        """Start the process, unless there is one at the address, and wait for a first reading."""
        if self._socket is not None:
            return
        host, port = self._where()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((host, port))
        self._socket.setblocking(False)
        try:
            self._ask(Kind.HELLO, lambda: bool(self.info))
            self._check()
            self._ask(None, lambda: bool(self._latest))
        except BridgeError:
            self.disconnect()
            raise

    def await_reading(self) -> None:
        """In real time, wait for a reading that was not handed out, not much longer than a control
        period.
        """
        self._drain()
        if not self.info["lockstep"] and self._latest["seq"] == self._seen:
            self._hear(WAIT * self.info["control_s"])

    def get_observation(self) -> dict[str, float]:
        """Return the newest reading: in lock-step the one a control period after the last."""
        self._drain()
        if self.info["lockstep"]:
            if self._latest["seq"] == self._seen and self._answers[0] >= self._sent:
                self._sent = next(self._numbers)
                self._send(frame(Kind.PASS, self._sent))
            self._ask(None, lambda: self._answers[0] >= self._sent)
        self._seen = int(self._latest["seq"])
        return self._latest

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        """Send targets of joints, or the elements of an action, all of them; return them."""
        sent = {k: float(action[k]) for k in self.info["command"]}
        self._sent = next(self._numbers)
        self._send(frame(Kind.COMMAND, self._sent, list(sent.values())))
        return sent

    def restart(self, episode: int) -> None:
        """Put the robot where that episode of the trial begins, and hold it there."""
        self._restarts += 1
        values = [self._restarts, self.world, episode]
        self._ask(Kind.RESTART, lambda: self._answers[1] == self._restarts, values)

    def trial(self, world: int) -> None:
        """Choose the task, by its number, of the trial that the next restart begins; after the last
        comes the first.
        """
        self.world = world

    def damp(self) -> None:
        """Turn position gains off in the drives, until the next restart."""
        for _ in range(3):
            self._send(frame(Kind.DAMP, 0))

    def report(self) -> dict[str, Any]:
        """Return what the robot counted: commands taken and refused, delays, and what the episode
        really earned.
        """
        self._report: dict[str, Any] = {}
        self._ask(Kind.REPORT, lambda: bool(self._report))
        return self._report

    def disconnect(self) -> None:
        """Let go of the robot; a process that this client started ends."""
        if self._socket is not None:
            self._send(frame(Kind.BYE, 0))
            self._socket.close()
            self._socket = None
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _where(self) -> tuple[str, int]:
        if self.address:
            host, _, port = self.address.rpartition(":")
            if not port.isdecimal() or not 0 < int(port) < 65536:
                raise BridgeError(
                    f"{self.address!r} is not the address of a simulated robot: give host:port"
                )
            return host or HOST, int(port)
        return HOST, self._start()

    def _start(self) -> int:
        """Start the process and return its port, which is the first line it prints."""
        command = [sys.executable, "-m", "metarobot.deploy.sim_robot_server", *self._arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)  # noqa: S603
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START)
        line = self._process.stdout.readline() if ready else b""
        if not line.strip().isdigit():
            self._process.kill()
            _, errors = self._process.communicate()
            self._process = None
            said = errors.decode(errors="replace").strip().splitlines()
            raise BridgeError(
                f"the simulated robot does not start: {said[-1].removeprefix('error: ') if said else '?'}"
            )
        return int(line)

    def _check(self) -> None:
        """Refuse a robot that the policy was not made for."""
        wanted = (
            [f"{j}.pos" for j in self.meta.joint_names]
            if self.info["legged"]
            else self.meta.observation_names
        )
        there = self.info["command"] if self.info["legged"] else self.info["reading"][: len(wanted)]
        if list(wanted) != list(there):
            raise BridgeError(
                f"the policy is for {_few(wanted)}, the simulated {self.info['family']} has {_few(there)}"
            )

    def _send(self, data: bytes) -> None:
        link = self._socket
        if link is None:
            return
        try:
            link.send(data)
        except BlockingIOError:
            pass
        except OSError as e:
            if data[4] in (Kind.COMMAND, Kind.HELLO):
                raise BridgeError(f"the simulated robot is gone: {e.strerror}") from e

    def _ask(self, kind: Kind | None, answered: Callable[[], bool], values: Any = None) -> None:
        """Listen until there is an answer; send the request, if there is one, again and again.

        Time in which this process was not let run does not count: the robot's was not either.
        """
        waited = due = 0.0
        while not answered():
            if waited >= TIMEOUT:
                raise BridgeError(f"the simulated robot has not answered for {TIMEOUT:g} s")
            if kind is not None and waited >= due:
                self._send(frame(kind, 0, values))
                due = waited + AGAIN
            began = time.monotonic()
            self._hear(AGAIN)
            waited += min(time.monotonic() - began, AGAIN)

    def _hear(self, seconds: float) -> None:
        """Wait for frames, so long at most, and take in all there are."""
        select.select([self._link()], [], [], seconds)
        self._drain()

    def _link(self) -> socket.socket:
        if self._socket is None:
            raise BridgeError("the simulated robot is not connected")
        return self._socket

    def _drain(self) -> None:
        """Take in all frames there are; of readings the newest is enough."""
        link = self._link()
        newest = None
        while True:
            try:
                parsed = parse(link.recv(LARGEST))
            except BlockingIOError:
                break
            except OSError as e:
                raise BridgeError(f"the simulated robot is gone: {e.strerror}") from e
            if parsed is None:
                continue
            kind, number, payload = parsed
            if kind == Kind.READING:
                newest = number, payload
            elif kind == Kind.REFUSED:
                raise BridgeError(json.loads(payload)["reason"])
            elif kind == Kind.INFO:
                self.info = json.loads(payload)
            elif kind == Kind.REPORT:
                self._report = json.loads(payload)
        if newest is not None and self.info:
            self._take(*newest)

    def _take(self, number: int, payload: bytes) -> None:
        stamp, command, restart, *values = np.frombuffer(payload, "<f8").tolist()
        if restart == self._restarts:  # else it is of before the restart asked for
            self._latest = {"stamp": stamp, "seq": float(number)}
            self._latest.update(zip(self.info["reading"], values, strict=True))
        self._answers = int(command), int(restart)


def _few(names: Any) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, … ({len(names)})"
