"""Faults of every kind against the controller, and checks of what reached the robot.

Time is stepped: a run of 1.5 s takes milliseconds, and every bound is checked exactly.
"""

import math
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
from bridging import (
    JOINTS,
    LIMIT,
    PlainLayout,
    RecordingRobot,
    RestartingRobot,
    WavePolicy,
    meta,
)

from metarobot.bridge.controller import MOST_SLOW_STEPS, Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import SteppedClock
from metarobot.bridge.robot_interface import GYRO, QUAT
from metarobot.bridge.run_report import RunSettings
from metarobot.bridge.safety.command_gate import CommandGate, DampedError, damping_bounds_s
from metarobot.bridge.safety.plausibility_checks import FROZEN_S, IMU_FROZEN_S, STUCK_S
from metarobot.bridge.safety.reading_checks import CLOCK_JUMP_S

PERIOD_S = 0.02
WEIRD_NUMBERS = (math.nan, math.inf, -math.inf)

SHAKING_FAULTS = ("bumped", "fast joint")
"""Faults that may make a joint so wrong that no target is safe, or its reading cannot be true: then
damping is right."""
SHAKING_REASONS = (
    "no target is safe",
    "jumped by",
    "angles differ by",
    "outside its range",
    "before the start",
)
HARMLESS_FAULTS = ("none", "swapped", "huge action", *SHAKING_FAULTS, "one late step")
READING_FAULTS = (
    "not a number",
    "missing",
    "no float",
    "frozen stamp",
    "frozen seq",
    "frozen all",
    "older for ever",
)
IMPLAUSIBLE_FAULTS = (
    "out of range",
    "second publisher",
    "too much torque",
    "speed sensor off",
    "frozen values",
    "stuck joint",
    "frozen imu",
    "fallen",
    "upside down",
    "attitude jumps",
    "imu of zeros",
)
"""Readings of the right form that cannot be true, or a robot that has fallen."""
NOTICED_AFTER_S = {"frozen values": FROZEN_S, "stuck joint": STUCK_S, "frozen imu": IMU_FROZEN_S}
"""Fault -> how long it must last, if targets move, until it is noticed; others: one reading."""
CONNECTION_FAULTS = (
    "clock ahead",
    "clock back",
    "clock creeps",
    "link lost",
    "link breaks at command",
    "driver hangs",
)
POLICY_FAULTS = (
    "policy nan",
    "policy shape",
    "policy nothing",
    "policy raises",
    "policy hangs",
    "policy late",
    "damping fails",
    "damping raises anything",
)
FAULTS = (
    *HARMLESS_FAULTS,
    *READING_FAULTS,
    *IMPLAUSIBLE_FAULTS,
    *CONNECTION_FAULTS,
    *POLICY_FAULTS,
)


class SensingLayout(PlainLayout):
    """A layout that needs torques and an IMU, so that these are checked as well."""

    def needed(self) -> tuple[str, ...]:
        return (*super().needed(), *(f"{joint}.tau" for joint in JOINTS), *QUAT, *GYRO)


class WatchdogClock(SteppedClock):
    """A stepped clock that checks the gate where the watchdog's thread would."""

    gate: CommandGate | None = None

    def let_pass(self, seconds: float) -> None:
        """Let time go by while the loop is stuck."""
        end = self.time + seconds
        if self.gate is not None and self.gate.due < end:
            self.time = max(self.time, self.gate.due + 1e-3)
            with suppress(DampedError):
                self.gate.check()
        self.time = max(self.time, end)


class FuzzedRun:
    """One run with one fault, which begins at a random reading."""

    def __init__(self, rng: np.random.Generator, fault: str) -> None:
        self.rng = rng
        self.fault = fault
        self.clock = WatchdogClock()
        self.first_bad_reading = int(rng.integers(2, 45))
        trial = meta().trial.__class__(int(rng.integers(2, 25)), int(rng.integers(1, 4)))
        self.about = meta(trial=trial)

        # A restart may move the clock as much as these faults do, so they would not be faults then
        clock_jumps = fault.startswith("clock") or fault == "frozen stamp"
        # A robot that restarts may have fallen, and its restart may move anything
        robot_class = RecordingRobot
        if not clock_jumps and fault not in IMPLAUSIBLE_FAULTS:
            robot_class = (RecordingRobot, RestartingRobot)[int(rng.integers(2))]
        self.robot: Any = robot_class(self.about, self.clock, self.spoil)
        self.robot.pos = rng.uniform(-1, 1, 2)
        self._robot_send = self.robot.send_action
        self._robot_damp = self.robot.damp
        self.robot.send_action = self.send_action
        self.robot.damp = self.damp

        self.fault_began_at = math.inf
        self.good_readings_at: list[float] = []
        """Times at which good new readings went out."""
        self.last_good: dict[str, float] = {}
        self.dampings = 0
        self.late_steps = 0

    @property
    def on(self) -> bool:
        """Whether the fault has begun."""
        return self.robot.reads >= self.first_bad_reading

    def note_fault(self) -> None:
        """Note the time of the first effect of the fault."""
        self.fault_began_at = min(self.fault_began_at, self.clock.now())

    def spoil(self, count: int, reading: dict[str, float]) -> dict[str, float]:
        """Change a reading as the fault has it."""
        reading |= self._imu()
        if self.fault == "bumped" and self.rng.random() < 0.3:
            reading[f"{JOINTS[0]}.pos"] += self.rng.uniform(-0.6, 0.6)
        if self.fault == "fast joint" and self.rng.random() < 0.3:
            reading[f"{JOINTS[1]}.vel"] = self.rng.uniform(-18, 18)

        true = dict(reading)
        if self.on:
            reading = self._spoiled(reading)
        # A clock that creeps is wrong only once it is behind by more than a jump
        behind = true["stamp"] - reading["stamp"] if self.fault == "clock creeps" else math.inf
        if reading != true and behind > CLOCK_JUMP_S:
            self.note_fault()
        # A wrong stamp on a true reading: what the robot does is known
        if reading == true or self.fault.startswith("clock"):
            self.good_readings_at.append(self.clock.now())
            self.last_good = dict(reading)
        return reading

    def _imu(self, tilt: float = 0.0) -> dict[str, float]:
        """Return an IMU's numbers at a tilt, rad, with noise."""
        half = (tilt + self.rng.normal(0, 0.01)) / 2
        roll = self.rng.uniform(0, 2 * math.pi) if tilt else 0.0
        quat = (
            math.cos(half),
            math.sin(half) * math.cos(roll),
            math.sin(half) * math.sin(roll),
            0.0,
        )
        gyro = self.rng.normal(0, 0.1, 3).tolist()
        return dict(zip((*QUAT, *GYRO), (*quat, *gyro), strict=True))

    def _spoiled(self, reading: dict[str, float]) -> dict[str, float]:
        last = self.last_good or reading
        key = ("stamp", "hip.pos", "knee.vel", "seq")[int(self.rng.integers(4))]
        match self.fault:
            case "not a number":
                return reading | {key: WEIRD_NUMBERS[int(self.rng.integers(3))]}
            case "missing":
                return {k: value for k, value in reading.items() if k != key}
            case "no float":
                odd: Any = (None, "x", [1.0])[int(self.rng.integers(3))]
                return reading | {key: odd}
            case "frozen stamp":
                return reading | {"stamp": last["stamp"]}
            case "frozen seq":
                return reading | {"seq": last["seq"]}
            case "frozen all":
                return dict(last)
            case "older for ever":
                stamp = last["stamp"] - 0.001 * self.robot.reads
                return reading | {"stamp": stamp, "seq": last["seq"] - 1}
            case "swapped" if self.robot.reads == self.first_bad_reading:
                return reading | {"stamp": last["stamp"] - 0.001, "seq": last["seq"] - 0.5}
            case "clock ahead":
                return reading | {"stamp": reading["stamp"] + 0.5}
            case "clock back":
                return reading | {"stamp": reading["stamp"] - 0.5}
            case "clock creeps":
                creep = 0.01 * (self.robot.reads - self.first_bad_reading)
                return reading | {"stamp": reading["stamp"] - creep}
            case "out of range":
                side = (1.0, -1.0)[int(self.rng.integers(2))]
                return reading | {"knee.pos": side * self.rng.uniform(1.25, 9.0)}
            case "second publisher" if self.robot.reads % 2 == 0:
                shift = math.copysign(0.6, -reading["hip.pos"])
                return reading | {"hip.pos": reading["hip.pos"] + shift}
            case "too much torque":
                return reading | {"hip.tau": self.rng.choice([-1000.0, 31.0, 1e300])}
            case "speed sensor off":
                return reading | {"knee.vel": reading["knee.vel"] - 8.0}
            case "frozen values":
                return last | {"stamp": reading["stamp"], "seq": reading["seq"]}
            case "stuck joint":
                return reading | {"hip.pos": last["hip.pos"], "hip.vel": last["hip.vel"]}
            case "frozen imu":
                return reading | {key: last[key] for key in (*QUAT, *GYRO)}
            case "fallen":
                return reading | self._imu(self.rng.uniform(math.radians(65), math.pi))
            case "upside down":
                return reading | dict(zip(QUAT, (0.0, 1.0, 0.0, 0.0), strict=True))
            case "attitude jumps":
                return reading | self._imu(math.radians(55) * (self.robot.reads % 2))
            case "imu of zeros":
                return reading | dict.fromkeys(QUAT, 0.0)
            case "link lost":
                self.note_fault()
                if self.rng.integers(2) == 0:
                    raise BridgeError("the link is lost")
                raise OSError("network is down")
        return reading

    def send_action(self, action: Any) -> Any:
        """Take a command, or fail to."""
        if self.on and self.fault == "link breaks at command":
            self.note_fault()
            raise BridgeError("the link is lost")
        if self.on and self.fault == "driver hangs" and self.fault_began_at == math.inf:
            self.note_fault()
            sent = self._robot_send(action)
            self.clock.let_pass(0.3)
            return sent
        return self._robot_send(action)

    def damp(self) -> None:
        """Damp, or fail to a few times."""
        self.dampings += 1
        self._robot_damp()
        if self.fault == "damping fails" and self.dampings < 5:
            raise OSError("no buffer space")
        if self.fault == "damping raises anything" and self.dampings < 20:
            errors = (RuntimeError, ValueError, KeyError, MemoryError, AssertionError, TypeError)
            raise errors[self.dampings % len(errors)]("a bug in the driver")

    def act(self, policy: WavePolicy, obs: Any) -> Any:
        """Choose an action, or fail to."""
        action = np.clip(np.sin(0.3 * len(policy.inputs)) + obs[:2], -4, 4)
        if not self.on:
            return action
        odd = WEIRD_NUMBERS[int(self.rng.integers(3))]
        match self.fault:
            case "huge action":
                return self.rng.uniform(-1, 1, 2) * 10.0 ** self.rng.integers(0, 8)
            case "policy nan":
                self.note_fault()
                return np.array([0.0, odd])
            case "policy shape":
                self.note_fault()
                return np.zeros((0, 1, 3)[int(self.rng.integers(3))])
            case "policy nothing":
                self.note_fault()
                return None
            case "policy raises":
                self.note_fault()
                raise RuntimeError("a bug in the policy")
            case "policy hangs" if self.fault_began_at == math.inf:
                self.note_fault()
                self.clock.let_pass(self.rng.uniform(0.06, 0.5))
            case "policy late":
                self.late_steps += 1
                self.clock.let_pass(0.03)
            case "one late step" if self.fault_began_at == math.inf:
                self.note_fault()
                self.clock.let_pass(0.03)
        return action

    def run(self) -> Controller:
        """Run the controller; return it, with its report."""
        policy = WavePolicy(self.about, act=self.act)
        settings = RunSettings(
            hz=1 / PERIOD_S,
            seconds=1.5,
            ready_s=float(self.rng.uniform(0, 0.3)),
            soft_s=0.1,
            damp_s=0.06,
        )
        controller = Controller(
            policy, self.robot, SensingLayout(self.about), settings, clock=self.clock
        )
        self.clock.gate = controller.gate
        # Bugs are raised, after damping
        with suppress(RuntimeError, OSError):
            controller.run()
        return controller

    def check(self, controller: Controller) -> None:
        """Raise ``AssertionError`` if anything unsafe reached the robot, or damping came late."""
        robot = self.robot
        where = f"{self.fault} at {self.first_bad_reading}"
        after_reading_s, _ = damping_bounds_s(PERIOD_S)
        bound_s = after_reading_s + NOTICED_AFTER_S.get(self.fault, 0.0)
        if self.fault in NOTICED_AFTER_S:
            # Targets that move slowly are not enough at once
            bound_s += 0.1

        # The run ends with damping, and no command follows damping
        assert robot.order[-1] == "damp", where
        first_damp = robot.order.index("damp")
        assert "command" not in robot.order[first_damp:], where

        # Every command answers a fresh reading, within the limits
        for when, command, reading in robot.commands:
            read_at = max(t for t in self.good_readings_at if t <= when)
            assert when - read_at <= bound_s, (where, "stale", when, read_at)
            self._check_command(command, reading, where)
        assert self.late_steps <= MOST_SLOW_STEPS, where

        # Damping follows a fault in time, unless the robot was just restarted and holds itself
        report = controller.report
        harmful = self.fault not in HARMLESS_FAULTS and self.fault_began_at < robot.damps[0]
        if harmful and robot.order[first_damp - 1] != "restart":
            lasted_s = robot.damps[0] - self.fault_began_at
            assert lasted_s <= bound_s + 1e-9, (where, lasted_s, report.reason)
            # A fault that takes a while may come so late that the run is over before
            assert report.fault or self.fault in NOTICED_AFTER_S, (where, report.reason)
        if self.fault in HARMLESS_FAULTS:
            known = any(reason in report.reason for reason in SHAKING_REASONS)
            unsafe = self.fault in SHAKING_FAULTS and known
            assert unsafe or not report.fault, (where, report.reason)

    def _check_command(self, command: Any, reading: Any, where: str) -> None:
        for joint in JOINTS:
            target = command[f"{joint}.pos"]
            assert math.isfinite(target), where
            assert LIMIT["low"] <= target <= LIMIT["high"], where

            # With a spoiled reading the controller cannot know the joint's true state
            pos = reading.get(f"{joint}.pos")
            vel = reading.get(f"{joint}.vel")
            if pos is None or vel is None or self.on:
                continue
            if not (math.isfinite(pos) and math.isfinite(vel)):
                continue
            # τ = kp (target − q) − kd q̇
            torque = 40 * (target - pos) - vel
            assert abs(torque) <= LIMIT["torque"] + 1e-9, (where, torque)
            if abs(vel) > LIMIT["velocity"]:
                assert torque * math.copysign(1, vel) <= 1e-9, where


def fuzz(ticks: int, seed: int) -> Counter[str]:
    """Run with faults until so many ticks have passed.

    Returns the number of runs with each fault, and of ``ticks``, ``commands`` and ``runs``.
    """
    rng = np.random.default_rng(seed)
    counts = Counter[str]()
    while counts["ticks"] < ticks:
        fault = FAULTS[counts["runs"] % len(FAULTS)]
        run = FuzzedRun(rng, fault)
        controller = run.run()
        run.check(controller)
        counts[fault] += 1
        counts["runs"] += 1
        counts["ticks"] += int(controller.report.pace["ticks"])
        counts["commands"] += len(run.robot.commands)
    return counts
