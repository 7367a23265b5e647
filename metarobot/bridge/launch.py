"""Launch a run from the command line: check everything, connect, and clean up in reverse order.

Nothing is sent before policy, options and robot fit together. Whatever happens after that, damping
is the last thing the robot receives.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import numpy as np

from metarobot.bridge.adaptation_client import AdaptationClient
from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import LoopClock, MonotonicClock, SteppedClock
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.robot_interface import OperatorCommandLayout, Reading, SignalLayout
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.run_options import RunOptions
from metarobot.bridge.run_report import RunReport, RunSettings
from metarobot.bridge.safety.command_gate import GateWatchdog, damping_bounds_s
from metarobot.bridge.safety.emergency_stop import stop_signals
from metarobot.bridge.safety.guard_process import guard_process
from metarobot.bridge.safety.reading_checks import ReadingChecker
from metarobot.bridge.tools.terminal_panel import terminal_panel

WARM_UP_STEPS = 3
"""Steps of the policy before the run: the first ones take many times as long as later ones."""
SIGNAL_EXIT_CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
"""Reason for the end of a run -> exit code, 128 + number of the signal."""


def run(folder: str, options: RunOptions) -> RunReport:
    """Run the policy of a folder on a robot.

    Raises:
        BridgeError: something does not fit together; nothing was sent.
    """
    # Everything that can be checked without the robot comes first
    policy = OnnxPolicy.load(folder)
    hz = robots.control_rate_hz(policy.meta, options.hz, options.any_rate)
    options.check()
    layout = robots.make_layout(policy.meta)
    if isinstance(layout, OperatorCommandLayout):
        layout.command[:] = options.command
    robot_settings = robots.parse_settings(_name_value_pairs(options.set))
    robot = robots.make_robot(options.robot, policy.meta, **robot_settings)

    # The stack is undone in reverse: watchdog, signals, guard, panel, connection, lock. So the
    # guard leaves only after the controller has damped, and the robot is free only after that.
    with ExitStack() as stack:
        stack.enter_context(robots.exclusive_control(robot.identity))
        stack.callback(robot.disconnect)
        title = f"{policy.meta.family} · {policy.meta.agent} · {robot.name}"
        panel = stack.enter_context(terminal_panel(title, options.plain))

        panel.show_message(f"connecting to {robot.name}")
        robot.connect()
        reading = robots.check_robot_readings(policy.meta, layout.needed(), robot)
        _warm_up(policy, layout, reading)

        heartbeat: Callable[[], None] = lambda: None  # noqa: E731
        if robot.guarded:
            guard = guard_process(folder, options.robot, robot_settings, 1 / hz)
            heartbeat = stack.enter_context(guard)
        stop = stack.enter_context(stop_signals())

        clock: LoopClock = MonotonicClock()
        if robot_settings.get("lockstep"):
            clock = SteppedClock()
        adaptation = None
        if options.adapt:
            adaptation = AdaptationClient(
                policy.meta, rollouts=options.rollouts, kl=options.kl, run=options.run
            )
        controller = Controller(
            policy,
            robot,
            layout,
            RunSettings(
                hz=hz,
                seconds=options.seconds,
                trials=options.trials,
                episodes=options.episodes,
                ready_s=options.ready_s,
                soft_s=options.soft_s,
                rate=options.rate,
                seed=options.seed,
                log_part_mb=options.log_part_mb,
                log_max_mb=options.log_max_mb,
            ),
            clock=clock,
            heartbeat=heartbeat,
            log=options.log,
            adaptation=adaptation,
            show_status=panel.show_status,
            show_message=panel.show_message,
        )

        watchdog = stack.enter_context(GateWatchdog(controller.gate, stop.sources))
        watchdog.on_loop_hung = lambda: _exit_hung_process(
            stop.restore_terminal, controller.gate.reason
        )

        meta = policy.meta
        if "reward_in" in meta.inputs and meta.reward is None and "reward" not in reading:
            panel.show_message(
                "this robot reports no reward: an agent that learns from it gets 0, and will "
                "hardly adapt"
            )
        after_reading_s, after_command_s = damping_bounds_s(1 / hz)
        panel.show_message(
            f"{hz:g} Hz; damping within {1e3 * after_reading_s:.0f} ms of the last good reading, "
            f"{1e3 * after_command_s:.0f} ms of the last command; any key, Ctrl-C or SIGTERM stops"
        )
        return controller.run()


def _warm_up(policy: OnnxPolicy, layout: SignalLayout, reading: Reading) -> None:
    """Run reward, observation and policy a few times, so that the first real step is not slow.

    A slow first step would be close to the gate's patience, or beyond it. A reading that cannot be
    used is found here, before anything is sent.
    """
    ReadingChecker(layout.needed()).accept(reading, 0.0)
    last_action = np.zeros(len(policy.meta.action.names), np.float32)
    for i in range(WARM_UP_STEPS):
        later = {
            **reading,
            "seq": reading["seq"] + i,
            "stamp": reading["stamp"] + i / policy.meta.control_hz,
        }
        layout.reward(later, later, last_action, last_action)
        action = policy.act(layout.observe(later, last_action), 0.0, False)
        layout.targets(action)
        layout.ended(later)
    layout.begin()
    policy.begin()


def _exit_hung_process(restore_terminal: Callable[[], None], reason: str) -> NoReturn:
    """End the process although the control loop does not return; the robot is damped already.

    ``sys.exit`` would wait for the thread that hangs, and Python cannot stop a thread.
    """
    restore_terminal()
    message = f"\nerror: {reason}; the policy or the robot's driver does not return"
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _name_value_pairs(words: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise BridgeError(f"{word!r} is not name=value")
        pairs[name] = value
    return pairs


def print_report(report: RunReport) -> None:
    """Print the outcome of a run."""
    timing: Any = report.pace
    print(f"stopped: {report.reason}; damping was sent")
    print(
        f"{timing['ticks']:,} steps, {report.sent:,} commands; "
        f"deadlines missed: {timing['missed_own']} by the loop, {timing['missed_host']} by the host"
    )
    print(
        f"start delay: p50 {timing['late_p50_ms']:.2f}, p99 {timing['late_p99_ms']:.2f}, "
        f"max {timing['late_max_ms']:.2f} ms; "
        f"step duration: p50 {timing['work_p50_ms']:.2f}, p99 {timing['work_p99_ms']:.2f}, "
        f"max {timing['work_max_ms']:.2f} ms"
    )
    for i, returns in enumerate(report.returns):
        if returns:
            print(f"trial {i + 1}: return {' → '.join(f'{value:.1f}' for value in returns)}")
    for line in report.adapted:
        print(line)
    for joint, counts in report.limited.items():
        print(f"limited {joint}: {', '.join(f'{kind} {n}' for kind, n in counts.items())}")
    if report.log_failure:
        print(f"the log is not complete: {report.log_failure}")
    elif report.dropped:
        print(f"{report.dropped} steps are not in the log: its writer could not keep up")


def exit_code(report: RunReport) -> int:
    """Return the exit code of a run: 1 after a fault, 128 + n after signal n, otherwise 0.

    A log that is not complete is a fault too.
    """
    if report.fault or report.log_failure:
        return 1
    return SIGNAL_EXIT_CODES.get(report.reason, 0)
