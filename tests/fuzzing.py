"""Faults of every kind thrown at the controller, and the checks of what reached the robot; time is
stepped."""

import math
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
from bridging import JOINTS, LIMIT, Plain, Recorder, Restarting, Wave, meta

from metarobot.bridge.controller import MOST_SLOW_STEPS, Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import SteppedClock
from metarobot.bridge.run_report import RunSettings
from metarobot.bridge.safety.command_gate import CommandGate, DampedError, damping_bounds_s
from metarobot.bridge.safety.reading_checks import CLOCK_JUMP_S

PERIOD = 0.02
NUMBERS = (math.nan, math.inf, -math.inf, 1e300, -1e300, 1e12, -5.0, 5.0)
HARMLESS = ("none", "swapped", "huge action", "bumped", "fast joint", "one late step")
FAULTS = (
    *HARMLESS,
    *(
        "not a number",
        "missing",
        "no float",
        "frozen stamp",
        "frozen seq",
        "frozen all",
        "older for ever",
    ),
    *(
        "clock ahead",
        "clock back",
        "clock creeps",
        "link lost",
        "link breaks at command",
        "driver hangs",
    ),
    *(
        "policy nan",
        "policy shape",
        "policy nothing",
        "policy raises",
        "policy hangs",
        "policy late",
        "damping fails",
    ),
)


class Watched(SteppedClock):
    """A stepped clock that wakes the gate where the thread that watches it would."""

    gate: CommandGate | None = None

    def pass_(self, seconds: float) -> None:
        """Let time go by while the loop is stuck."""
        end = self.time + seconds
        if self.gate is not None and self.gate.due < end:
            self.time = max(self.time, self.gate.due + 1e-3)
            with suppress(DampedError):
                self.gate.check()
        self.time = max(self.time, end)


class Fuzz:
    """One run with one fault, begun at a random step."""

    def __init__(self, rng: np.random.Generator, fault: str) -> None:
        self.rng, self.fault, self.clock = rng, fault, Watched()
        self.at = int(rng.integers(2, 45))
        self.about = meta(
            trial=meta().trial.__class__(int(rng.integers(2, 25)), int(rng.integers(1, 4)))
        )
        jumps = (
            fault.startswith("clock") or fault == "frozen stamp"
        )  # a restart may do as much to a clock
        kind = Recorder if jumps else (Recorder, Restarting)[int(rng.integers(2))]
        self.robot: Any = kind(self.about, self.clock, self.spoil)
        self.robot.pos = rng.uniform(-1, 1, 2)
        self._send, self._damp = self.robot.send_action, self.robot.damp
        self.robot.send_action, self.robot.damp = self.command, self.limp
        self.struck = math.inf
        """When the fault began."""
        self.good: list[float] = []
        """When good new readings went out."""
        self.kept: dict[str, float] = {}
        self.failures = self.late = 0

    @property
    def on(self) -> bool:
        """Whether the fault has begun."""
        return self.robot.reads >= self.at

    def strike(self) -> None:
        self.struck = min(self.struck, self.clock.now())

    def spoil(self, count: int, reading: dict[str, float]) -> dict[str, float]:
        """Change a reading as the fault has it."""
        if self.fault == "bumped" and self.rng.random() < 0.3:
            reading[f"{JOINTS[0]}.pos"] += self.rng.uniform(-0.6, 0.6)
        if self.fault == "fast joint" and self.rng.random() < 0.3:
            reading[f"{JOINTS[1]}.vel"] = self.rng.uniform(-30, 30)
        before = dict(reading)
        if self.on:
            reading = self.spoiled(reading)
        if reading != before and (
            self.fault != "clock creeps" or before["stamp"] - reading["stamp"] > CLOCK_JUMP_S
        ):
            self.strike()
        if reading == before or self.fault.startswith("clock"):  # a wrong stamp on a true reading
            self.good.append(self.clock.now())
            self.kept = dict(reading)
        return reading

    def spoiled(self, r: dict[str, float]) -> dict[str, float]:
        kept, key = (
            self.kept or r,
            ("stamp", "hip.pos", "knee.vel", "seq")[int(self.rng.integers(4))],
        )
        match self.fault:
            case "not a number":
                return r | {key: NUMBERS[int(self.rng.integers(3))]}
            case "missing":
                return {k: v for k, v in r.items() if k != key}
            case "no float":
                return r | {key: (None, "x", [1.0])[int(self.rng.integers(3))]}  # type: ignore[dict-item]
            case "frozen stamp":
                return r | {"stamp": kept["stamp"]}
            case "frozen seq":
                return r | {"seq": kept["seq"]}
            case "frozen all":
                return dict(kept)
            case "older for ever":
                return r | {
                    "stamp": kept["stamp"] - 0.001 * self.robot.reads,
                    "seq": kept["seq"] - 1,
                }
            case "swapped" if self.robot.reads == self.at:
                return r | {"stamp": kept["stamp"] - 0.001, "seq": kept["seq"] - 0.5}
            case "clock ahead":
                return r | {"stamp": r["stamp"] + 0.5}
            case "clock back":
                return r | {"stamp": r["stamp"] - 0.5}
            case "clock creeps":
                return r | {"stamp": r["stamp"] - 0.01 * (self.robot.reads - self.at)}
            case "link lost":
                self.strike()
                raise (BridgeError("the link is lost"), OSError("network is down"))[
                    int(self.rng.integers(2))
                ]
        return r

    def command(self, action: Any) -> Any:
        """Take a command, or fail to."""
        if self.on and self.fault == "link breaks at command":
            self.strike()
            raise BridgeError("the link is lost")
        if self.on and self.fault == "driver hangs" and self.struck == math.inf:
            self.strike()
            sent = self._send(action)
            self.clock.pass_(0.3)
            return sent
        return self._send(action)

    def limp(self) -> None:
        self.failures += 1
        self._damp()
        if self.fault == "damping fails" and self.failures < 5:
            raise OSError("no buffer space")

    def act(self, policy: Wave, obs: Any) -> Any:
        """Choose an action, or fail to."""
        fine = np.clip(np.sin(0.3 * len(policy.told)) + obs[:2], -4, 4)
        if not self.on:
            return fine
        odd = NUMBERS[int(self.rng.integers(3))]
        match self.fault:
            case "huge action":
                return self.rng.uniform(-1, 1, 2) * 10.0 ** self.rng.integers(0, 8)
            case "policy nan":
                self.strike()
                return np.array([0.0, odd])
            case "policy shape":
                self.strike()
                return np.zeros((0, 1, 3)[int(self.rng.integers(3))])
            case "policy nothing":
                self.strike()
                return None
            case "policy raises":
                self.strike()
                raise RuntimeError("a bug in the policy")
            case "policy hangs" if self.struck == math.inf:
                self.strike()
                self.clock.pass_(self.rng.uniform(0.06, 0.5))
            case "policy late":
                self.late += 1
                self.clock.pass_(0.03)
            case "one late step" if self.struck == math.inf:
                self.strike()
                self.clock.pass_(0.03)
        return fine

    def run(self) -> Controller:
        """Live the run."""
        policy = Wave(self.about, act=self.act)
        settings = RunSettings(
            hz=50, seconds=1.5, ready_s=float(self.rng.uniform(0, 0.3)), soft_s=0.1, damp_s=0.06
        )
        one = Controller(policy, self.robot, Plain(self.about), settings, clock=self.clock)
        self.clock.gate = one.gate
        with suppress(RuntimeError, OSError):
            one.run()
        return one

    def check(self, one: Controller) -> None:
        """Raise ``AssertionError`` if anything unsafe reached the robot, or damping came late."""
        robot, told = self.robot, f"{self.fault} at {self.at}"
        assert robot.order[-1] == "damp", told
        first = robot.order.index("damp")
        assert "command" not in robot.order[first:], told
        for when, command, seen in robot.commands:
            heard = max(t for t in self.good if t <= when)
            assert when - heard <= damping_bounds_s(PERIOD)[0], (told, "stale", when, heard)
            self._safe(command, seen, told)
        if self.fault not in HARMLESS and self.struck < robot.damps[0]:
            held = robot.order[first - 1] == "restart"  # a robot that holds itself has more time
            assert held or robot.damps[0] - self.struck <= damping_bounds_s(PERIOD)[0] + 1e-9, told
            assert held or one.report.fault, told
        assert self.late <= MOST_SLOW_STEPS, told
        if self.fault in HARMLESS:
            unsafe = self.fault in HARMLESS[-3:-1] and "no target is safe" in one.report.reason
            assert unsafe or not one.report.fault, (told, one.report.reason)

    def _safe(self, command: Any, seen: Any, told: str) -> None:
        for joint in JOINTS:
            target, pos, vel = (
                command[f"{joint}.pos"],
                seen.get(f"{joint}.pos"),
                seen.get(f"{joint}.vel"),
            )
            assert math.isfinite(target), told
            assert LIMIT["low"] <= target <= LIMIT["high"], told
            if (
                pos is None
                or vel is None
                or not (math.isfinite(pos) and math.isfinite(vel))
                or self.on
            ):
                continue
            drive = 40 * (target - pos) - vel
            assert abs(drive) <= LIMIT["torque"] + 1e-9, (told, drive)
            assert abs(vel) <= LIMIT["velocity"] or drive * math.copysign(1, vel) <= 1e-9, told


def fuzz(ticks: int, seed: int) -> Counter[str]:
    """Throw faults until so many steps have been lived; return how often each kind was met, and
    ``ticks``."""
    rng, met = np.random.default_rng(seed), Counter[str]()
    while met["ticks"] < ticks:
        fault = FAULTS[met["runs"] % len(FAULTS)]
        one = Fuzz(rng, fault)
        controller = one.run()
        one.check(controller)
        met[fault] += 1
        met["runs"] += 1
        met["ticks"] += int(controller.report.pace["ticks"])
        met["commands"] += len(one.robot.commands)
    return met
