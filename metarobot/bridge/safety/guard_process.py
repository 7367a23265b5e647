"""The guard: a process beside the controller that damps a robot when the controller dies or hangs.

For robots that go on with the last command for ever. It is connected as the controller is, sends
nothing as long as it hears a beat with every command, and is told when all is over. ``kill -9`` of
the controller ends the pipe at once. Such a robot's class takes a setting ``guard``, true in this
process: there it must bear another controller beside it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import Meta
from metarobot.bridge.robot_interface import Robot
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.safety.command_gate import AGAIN, patience
from metarobot.bridge.tools.child_process import Child

START_S, DAMP_S = 20.0, 5.0
"""How long to wait for the guard to be there, and for how long it sends damping, s."""
BEAT, OVER = b"b", b"o"
READY = b"ready\n"


@contextmanager
def guarding(folder: str, spec: str, settings: dict[str, Any], period: float) -> Iterator[Any]:
    """Run a guard while the robot is driven; lends what is to be called with each command."""
    child = Child("guard", folder, spec, json.dumps(settings), str(patience(period)), answers=True)
    try:
        assert child.process.stdout is not None
        ready, _, _ = select.select([child.process.stdout], [], [], START_S)
        said = child.process.stdout.readline() if ready else b""
        if said != READY:
            raise BridgeError(
                f"the guard does not start: {said.decode(errors='replace').strip() or 'it says nothing'}"
            )
        yield lambda: _beat(child)
    finally:
        child.send(OVER)
        child.close(2.0)


def _beat(child: Child) -> None:
    if not child.send(BEAT) and not child.alive:
        raise BridgeError("the guard, which damps the robot if this process dies, has died")


def watch(robot: Robot, source: int, limit: float) -> bool:
    """Return true once the controller has said that all is over; false when it died or its beat
    stopped.
    """
    beating = False
    while True:
        ready, _, _ = select.select([source], [], [], limit if beating else None)
        data = os.read(source, 4096) if ready else b""
        if OVER in data:
            return True
        if not data:
            return not beating
        beating = True


def main(folder: str, spec: str, settings: str, limit: str) -> None:
    """Guard a robot until the pipe on standard input ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        chosen = json.loads(settings)
        robot = robots.make(spec, Meta.load(folder), **chosen, guard=True)
        robot.connect()
    except BridgeError as e:
        sys.stdout.write(f"{e}\n")
        return
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    if not watch(robot, sys.stdin.fileno(), float(limit)):
        end = time.monotonic() + DAMP_S
        while time.monotonic() < end:
            with suppress(BridgeError, OSError):
                robot.damp()
            time.sleep(AGAIN)
    robot.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
