"""A run from the command line: everything put together in the order in which it must be undone."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import Monotonic, Stepped
from metarobot.bridge.policy.onnx_policy import Policy
from metarobot.bridge.robot_interface import Layout, Reading
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.run_options import Options
from metarobot.bridge.run_report import Report, Settings
from metarobot.bridge.safety.command_gate import Watch, bounds
from metarobot.bridge.safety.emergency_stop import signs
from metarobot.bridge.safety.guard_process import guarding
from metarobot.bridge.safety.reading_checks import Readings
from metarobot.bridge.tools.terminal_panel import screen


def run(folder: str, options: Options) -> Report:
    """Run a policy on a robot. Nothing is sent before all fits; whatever happens then, damping is
    the last word.
    """
    o = options
    policy = Policy.load(folder)
    hz = robots.rate(policy.meta, o.hz, o.any_rate)
    o.check()
    layout = robots.layout(policy.meta)
    if hasattr(layout, "command"):
        layout.command[:] = o.command
    chosen = robots.settings(_pairs(o.set))
    robot = robots.make(o.robot, policy.meta, **chosen)
    pick = {
        k: getattr(o, k)
        for k in ("seconds", "trials", "episodes", "ready_s", "soft_s", "rate", "seed")
    }
    with ExitStack() as stack:
        stack.enter_context(robots.alone(robot.identity))
        stack.callback(robot.disconnect)
        shown = stack.enter_context(
            screen(f"{policy.meta.family} · {policy.meta.agent} · {robot.name}", o.plain)
        )
        shown.tell(f"connecting to {robot.name}")
        robot.connect()
        reading = robots.fits(policy.meta, layout.needed(), robot)
        _warm(policy, layout, reading)
        beat = (
            stack.enter_context(guarding(folder, o.robot, chosen, 1 / hz))
            if robot.guarded
            else lambda: None
        )
        stop = stack.enter_context(signs())
        controller = Controller(
            policy,
            robot,
            layout,
            Settings(hz=hz, **pick),
            clock=Stepped() if chosen.get("lockstep") else Monotonic(),
            beat=beat,
            log=o.log,
            adaptation=_adaptation(policy.meta, o) if o.adapt else None,
            show=shown.show,
            tell=shown.tell,
        )
        watch = stack.enter_context(Watch(controller.gate, stop.files))
        watch.hung = lambda: _abandon(stop.restore, controller.gate.reason)
        if (
            "reward_in" in policy.meta.inputs
            and policy.meta.reward is None
            and "reward" not in reading
        ):
            shown.tell(
                "this robot tells no reward: an agent that learns from it is told 0, and will hardly adapt"
            )
        heard, sent = bounds(1 / hz)
        shown.tell(
            f"{hz:g} Hz; damping within {1e3 * heard:.0f} ms of the last good reading, {1e3 * sent:.0f} ms of the "
            "last command; any key, Ctrl-C or SIGTERM stops"
        )
        return controller.run()


def _warm(policy: Policy, layout: Layout, reading: Reading) -> None:
    """Act a few times for nothing: first times take many times as long, which the robot need not
    wait for.
    """
    Readings(layout.needed()).take(reading, 0.0)
    last = np.zeros(len(policy.meta.action.names), np.float32)
    for i in range(3):
        later = {
            **reading,
            "seq": reading["seq"] + i,
            "stamp": reading["stamp"] + i / policy.meta.control_hz,
        }
        layout.reward(later, later, last, last)
        layout.targets(policy.act(layout.observe(later, last), 0.0, False))
        layout.ended(later)
    layout.begin()
    policy.begin()


def _adaptation(meta: Any, o: Options) -> Any:
    kind = importlib.import_module("metarobot.bridge.adaptation_client").Adaptation
    return kind(meta, rollouts=o.rollouts, kl=o.kl, run=o.run)


def _abandon(restore: Any, reason: str) -> None:
    """End the process although the loop does not come back; the robot is damped already."""
    restore()
    print(
        f"\nerror: {reason}; the policy or the robot's driver does not return",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _pairs(words: tuple[str, ...]) -> Mapping[str, str]:
    pairs = dict(word.partition("=")[::2] for word in words)
    if odd := [word for word in words if "=" not in word]:
        raise BridgeError(f"{odd[0]!r} is not name=value")
    return pairs


def tell(report: Report) -> None:
    """Say what came of a run."""
    p = report.pace
    print(f"stopped: {report.reason}; damping was sent")
    print(
        f"{p['ticks']:,} steps, {report.sent:,} commands; deadlines missed: {p['missed_own']} by the loop, "
        f"{p['missed_host']} by the host"
    )
    print(
        f"begun late: p50 {p['late_p50_ms']:.2f}, p99 {p['late_p99_ms']:.2f}, at most {p['late_max_ms']:.2f} ms; "
        f"a step took p50 {p['work_p50_ms']:.2f}, p99 {p['work_p99_ms']:.2f}, at most {p['work_max_ms']:.2f} ms"
    )
    for i, returns in enumerate(report.returns):
        if returns:
            print(f"trial {i + 1}: return {' → '.join(f'{r:.1f}' for r in returns)}")
    for said in report.adapted:
        print(said)
    for joint, kinds in report.limited.items():
        print(f"limited {joint}: {', '.join(f'{k} {n}' for k, n in kinds.items())}")
    if report.dropped:
        print(f"{report.dropped} steps are not in the log: the disk is too slow")


def code(report: Report) -> int:
    """Return the exit code of a run: 1 after a fault, 128 + n after signal n."""
    signals = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
    return 1 if report.fault else signals.get(report.reason, 0)
