"""Guard process: a second process that damps the robot if the controller process dies or hangs.

It is for robots that go on with the last command for ever (``Robot.guarded``). The guard opens its
own connection to the robot and sends nothing while heartbeats come through a pipe, one with each
command. It damps when

- the pipe ends: the controller process died, even of ``kill -9``;
- no heartbeat came for the gate's patience: the process hangs or was stopped, watchdog included.

It answers with heartbeats of its own. If they stop, the guard died or was stopped, and nobody would
damp the robot if the controller died too: the controller damps it within ``GUARD_SILENCE_S`` and
two control periods.

At the end of a run the controller tells it that all is over, and it leaves without damping. The
class of a guarded robot takes a keyword argument ``guard``, true in the guard process: there it
must tolerate another controller beside it.
"""

from __future__ import annotations

import json
import math
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

GUARD_SILENCE_S = 0.5
"""How long the guard's heartbeats may be missing.

Longer than the gate's patience, as a guard that is late harms only if the controller dies as well:
a busy computer may hold it up for a while."""
GUARD_BEAT_S = 0.05
"""How often the guard sends a heartbeat when it gets none; otherwise it answers each."""
RETRY_S = 0.1
"""How often a guard tries again to damp a robot that could not be damped in ``DAMPING_S``."""

HEARTBEAT = b"b"
RUN_IS_OVER = b"o"
READY_LINE = b"ready\n"
GUARD_DUTY = "the guard process, which damps the robot if this process dies,"


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
    patience = str(patience_s(period_s))
    arguments = (folder, spec, json.dumps(settings), patience, robots.module_folder(spec))
    child = ChildProcess("safety.guard_process", *arguments, answers=True)
    try:
        assert child.process.stdout is not None
        ready, _, _ = select.select([child.process.stdout], [], [], START_TIMEOUT_S)
        answer = child.process.stdout.readline() if ready else b""
        if answer != READY_LINE:
            problem = answer.decode(errors="replace").strip() or "it prints nothing"
            raise BridgeError(f"the guard process does not start: {problem}")

        answers = child.process.stdout.fileno()
        os.set_blocking(answers, False)
        last_answer_at = time.monotonic()

        def heartbeat() -> None:
            # A full pipe drops the heartbeat, which is harmless as more lie in it; a dead guard is
            # not: without it the robot would run on if this process died
            nonlocal last_answer_at
            if not child.send(HEARTBEAT) and not child.alive:
                raise BridgeError(f"{GUARD_DUTY} has died")

            now = time.monotonic()
            try:
                if os.read(answers, 4096):
                    last_answer_at = now
            except BlockingIOError:
                pass
            silent_s = now - last_answer_at
            if silent_s > GUARD_SILENCE_S:
                raise BridgeError(f"{GUARD_DUTY} has been silent for {silent_s:.2f} s")

        yield heartbeat
    finally:
        child.send(RUN_IS_OVER)
        child.close(CLOSE_TIMEOUT_S)


def watch_heartbeats(
    source: int, timeout_s: float, answer: Callable[[], None] = lambda: None
) -> bool:
    """Read heartbeats until they end; return whether the run ended as it should.

    False means that the controller process died or stopped sending heartbeats. Before the first
    heartbeat there is no timeout, and an end of the pipe is no fault: nothing was commanded yet.

    Args:
        source: The pipe from the controller.
        timeout_s: How long heartbeats may be missing.
        answer: Called for each heartbeat, and every ``GUARD_BEAT_S`` at least.
    """
    started = False
    last_at = math.inf
    while True:
        left_s = max(last_at + timeout_s - time.monotonic(), 0.0)
        ready, _, _ = select.select([source], [], [], min(left_s, GUARD_BEAT_S))
        answer()
        if ready:
            data = os.read(source, 4096)
            if RUN_IS_OVER in data:
                return True
            if not data:
                return not started
            started = True
            last_at = time.monotonic()
        elif time.monotonic() >= last_at + timeout_s:
            return False


def answer_heartbeat() -> None:
    """Write a heartbeat to standard output, unless the pipe is full or nobody reads it."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), HEARTBEAT)


def damp_until_done(robot: Robot, seconds: float) -> None:
    """Damp a robot for so long after the first success, whatever its driver raises.

    If it does not succeed in that time, SIGTERM ends this process: the robot may be gone for good.
    """
    end = time.monotonic() + seconds
    arrived = False
    reported = False
    while True:
        try:
            robot.damp()
        except Exception as e:
            if not reported:
                reported = True
                # Standard error may be gone as well
                with suppress(OSError):
                    print(f"damping failed, trying on: {e}", file=sys.stderr, flush=True)
        else:
            if not arrived:
                arrived = True
                end = time.monotonic() + seconds

        is_over = time.monotonic() >= end
        if is_over and arrived:
            return
        if is_over:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RETRY_S if is_over else DAMPING_REPEAT_S)


def main(folder: str, spec: str, settings: str, timeout_s: str, robot_folder: str = "") -> None:
    """Guard a robot until the pipe on standard input ends, or says that the run is over."""
    # A robot's own module may lie where only the controller's module path leads. Its folder comes
    # last: no file of it takes the place of a module of Python or of this package
    if robot_folder:
        sys.path.append(robot_folder)

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

    # A controller that was stopped reads no answers, and must not hold the guard up
    os.set_blocking(sys.stdout.fileno(), False)
    if not watch_heartbeats(sys.stdin.fileno(), float(timeout_s), answer_heartbeat):
        damp_until_done(robot, DAMPING_S)
    robot.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
