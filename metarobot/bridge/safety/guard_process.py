"""Guard process: a second process that damps the robot if the controller process dies or hangs.

It is for robots that go on with the last command for ever (``Robot.guarded``). The guard opens its
own connection to the robot and sends nothing while heartbeats come through a pipe, one with each
command. It damps when

- the pipe ends: the controller process died, even of ``kill -9``;
- no heartbeat came for the gate's patience: the process hangs or was stopped, watchdog included.

At the end of a run the controller tells it that all is over, and it leaves without damping. The
class of a guarded robot takes a keyword argument ``guard``, true in the guard process: there it
must tolerate another controller beside it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robot_interface import Robot
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.safety.command_gate import DAMPING_REPEAT_S, patience_s
from metarobot.bridge.tools.child_process import ChildProcess

START_TIMEOUT_S = 20.0
"""How long to wait for the guard's connection to the robot; nothing is commanded before it."""
CLOSE_TIMEOUT_S = 2.0
"""How long the guard may take to leave at the end of a run."""
DAMPING_S = 5.0
"""For how long the guard sends damping: long enough for a connection that drops packets."""

HEARTBEAT = b"b"
RUN_IS_OVER = b"o"
READY_LINE = b"ready\n"


@contextmanager
def guard_process(
    folder: str, spec: str, settings: dict[str, Any], period_s: float
) -> Iterator[Callable[[], None]]:
    """Run a guard while the robot is driven; yield the function that sends a heartbeat.

    Args:
        folder: Policy folder, from which the guard takes the metadata.
        spec: Name of the robot, or ``module:Class``.
        settings: Keyword arguments of the robot's class.
        period_s: Control period.

    Raises:
        BridgeError: the guard does not start or cannot connect; nothing has been commanded.
    """
    arguments = (folder, spec, json.dumps(settings), str(patience_s(period_s)))
    child = ChildProcess("safety.guard_process", *arguments, answers=True)
    try:
        assert child.process.stdout is not None
        ready, _, _ = select.select([child.process.stdout], [], [], START_TIMEOUT_S)
        answer = child.process.stdout.readline() if ready else b""
        if answer != READY_LINE:
            problem = answer.decode(errors="replace").strip() or "it prints nothing"
            raise BridgeError(f"the guard process does not start: {problem}")

        def heartbeat() -> None:
            # A full pipe drops the heartbeat, which is harmless as more lie in it; a dead guard is
            # not: without it the robot would run on if this process died
            if not child.send(HEARTBEAT) and not child.alive:
                raise BridgeError(
                    "the guard process, which damps the robot if this process dies, has died"
                )

        yield heartbeat
    finally:
        child.send(RUN_IS_OVER)
        child.close(CLOSE_TIMEOUT_S)


def watch_heartbeats(source: int, timeout_s: float) -> bool:
    """Read heartbeats until they end; return whether the run ended as it should.

    False means that the controller process died or stopped sending heartbeats. Before the first
    heartbeat there is no timeout, and an end of the pipe is no fault: nothing was commanded yet.
    """
    started = False
    while True:
        ready, _, _ = select.select([source], [], [], timeout_s if started else None)
        data = os.read(source, 4096) if ready else b""
        if RUN_IS_OVER in data:
            return True
        if not data:
            # Timeout, or end of the pipe
            return not started
        started = True


def main(folder: str, spec: str, settings: str, timeout_s: str) -> None:
    """Guard a robot until the pipe on standard input ends, or says that the run is over."""
    # Whoever terminates the whole process group must not take the guard along with the controller
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    try:
        keywords = json.loads(settings)
        robot: Robot = robots.make_robot(spec, PolicyMetadata.load(folder), **keywords, guard=True)
        robot.connect()
    except BridgeError as e:
        sys.stdout.write(f"{e}\n")
        return
    sys.stdout.buffer.write(READY_LINE)
    sys.stdout.buffer.flush()

    if not watch_heartbeats(sys.stdin.fileno(), float(timeout_s)):
        end = time.monotonic() + DAMPING_S
        while time.monotonic() < end:
            with suppress(BridgeError, OSError):
                robot.damp()
            time.sleep(DAMPING_REPEAT_S)
    robot.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
