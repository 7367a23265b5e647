"""Faults on a Go2's DDS wire, and a checker at its other end that shares no code with the driver.

``WireGo2`` publishes states and listens to commands as bytes, whose layout and the robot's limits
are written here a second time. Driver, layout, controller, gate and limits are the real ones. Time
is stepped: a control period passes with each reading, as fast as the wire allows.
"""

import math
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import numpy as np
from bridging import WavePolicy, meta
from fuzzing import WatchdogClock

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.layouts.legged import LeggedLayout
from metarobot.bridge.policy.metadata import JointLimit, TrialMetadata
from metarobot.bridge.robots import dds
from metarobot.bridge.robots import unitree_messages as go
from metarobot.bridge.robots.dds import DdsConnection, DdsParticipant
from metarobot.bridge.robots.unitree import UnitreeRobot
from metarobot.bridge.run_report import RunSettings

PERIOD_S = 0.02
ARRIVAL_S = 0.2
"""How long a message may be on its way on this machine."""
QUIET_S = 0.003
"""How long to wait for a message that may not come."""

# The robot, by Unitree's description of it: low, high, rad; speed, rad/s; torque, N·m
LEGS = ("FR", "FL", "RR", "RL")
HIP = (-1.0472, 1.0472, 30.1, 23.7)
FRONT_THIGH = (-1.5708, 3.4907, 30.1, 23.7)
REAR_THIGH = (-0.5236, 4.5379, 30.1, 23.7)
CALF = (-2.7227, -0.83776, 15.7, 45.43)
LIMITS = np.array([*[HIP, FRONT_THIGH, CALF] * 2, *[HIP, REAR_THIGH, CALF] * 2])
LOW, HIGH, MAX_SPEED, MAX_TORQUE = LIMITS.T
KP = 25.0
KD = 0.5
POSE = np.array([-0.1, 0.8, -1.5, 0.1, 0.8, -1.5, -0.1, 1.0, -1.5, 0.1, 1.0, -1.5])
JOINTS = tuple(f"{leg}_{part}" for leg in LEGS for part in ("hip", "thigh", "calf"))

# Bytes of a command after its header of four: the motors begin after 22, each has a byte, padding,
# and five floats, and is 36 bytes from the next
FIRST_MOTOR = 4 + 24
MOTOR_STRIDE = 36
MOTOR = struct.Struct("<5f")
NO_POSITION = 2.146e9
OTHERS_MARK = 7
"""Bandwidth, bytes 20 and 21, in the commands of another controller."""

# Numbers of a state
IMU = 9
MOTORS = 23
NUMBERS_PER_MOTOR = 12
REMOTE_BUTTONS = 299
FEET = 288
TICK = 296

HARMLESS = ("none", "one lost", "one twice", "one with a bit error", "noisy")
STOPPING = (
    "silence",
    "repeated",
    "bit errors",
    "tick stands",
    "tick jumps ahead",
    "tick jumps back",
    "big endian",
    "nan",
    "infinite",
    "out of range",
    "zeros between",
    "shifted between",
    "torque",
    "too fast",
    "upside down",
    "fallen",
    "attitude jumps",
    "quaternion of zeros",
    "remote stop",
    "other controller",
    "driver cannot send",
    "policy nan",
    "policy raises",
    "policy hangs",
)
"""Faults that must be damped within the gate's bound."""
SLOW = {"frozen values": 0.1, "speed off": 0.2, "stuck joint": 0.3, "frozen imu": 0.5}
"""Fault -> time in addition to that bound, s."""
UNCERTAIN = ("permuted legs",)
"""Nothing unsafe may follow, but the fault need not be noticed."""
DAMPING = ("damping raises",)
"""An operator's stop, while the driver fails to damp a few times."""
FAULTS = (*HARMLESS, *STOPPING, *SLOW, *UNCERTAIN, *DAMPING)
BOUND_S = 3 * PERIOD_S + 0.02
"""Latest damping after the last good reading, as documented."""
TRAVEL_S = 0.4
"""How long a slow fault may take longer because targets move slowly."""


def wire_type(kind: type, name: str) -> Any:
    """Return a DDS type of the same name and fields whose samples are bytes."""
    from cyclonedds.idl import make_idl_struct

    made = make_idl_struct(name, kind.__idl_typename__, dict(kind.__annotations__))  # type: ignore[attr-defined]
    made.serialize = lambda self, *a, **k: self.data
    made.deserialize = classmethod(lambda cls, data, *a, **k: sample(cls, bytes(data)))
    return made


def sample(kind: Any, data: bytes) -> Any:
    """Return a sample of a wire type."""
    made = object.__new__(kind)
    made.data = data
    return made


WireState = wire_type(go.LowState, "WireState")
WireCommand = wire_type(go.LowCmd, "WireCommand")


def go2_meta() -> Any:
    """Return the metadata of a policy for a Go2."""
    parts: dict[str, dict[str, tuple[float, ...]]] = {}
    for leg in LEGS:
        x = 0.1934 if leg[0] == "F" else -0.1934
        y = 0.0465 if leg[1] == "L" else -0.0465
        side = 0.0955 if leg[1] == "L" else -0.0955
        parts[leg] = {
            "hip": (x, y, 0.0),
            "thigh": (0.0, side, 0.0),
            "calf": (0.0, 0.0, -0.213),
            "foot": (0.0, 0.0, -0.213),
        }
    weights = {
        "track": 2.0,
        "turn": 0.3,
        "swing": 0.8,
        "bounce": 0.2,
        "wobble": 0.1,
        "tilt": 0.3,
        "effort": 0.05,
        "jerk": 0.1,
        "slip": 0.25,
        "pose": 0.2,
        "limits": 0.1,
    }
    return meta(
        joint_names=JOINTS,
        joint_stiffness=(KP,) * 12,
        joint_damping=(KD,) * 12,
        default_joint_pos=tuple(POSE.tolist()),
        action_scale=(0.25,) * 12,
        observation_names=tuple(f"obs_{i}" for i in range(45)),
        limits={joint: JointLimit(*row) for joint, row in zip(JOINTS, LIMITS, strict=True)},
        action=meta().action.__class__(
            tuple(f"{joint}_action" for joint in JOINTS), (-4.0,) * 12, (4.0,) * 12
        ),
        trial=TrialMetadata(horizon=60, episodes=2),
        reward={
            "kind": "quadruped",
            "foot_radius": 0.022,
            "step_height": 0.07,
            "touch": 1.0,
            "lowest": 0.1,
            "upright": 0.7,
            "weights": weights,
            "legs": parts,
        },
    )


class WireGo2:
    """The robot's end of the wire: it follows commands, publishes states, and checks what comes."""

    def __init__(self, domain: int) -> None:
        self.link = DdsParticipant("lo", domain)
        self._states = self.link.writer("rt/lowstate", WireState)
        self._commands = self.link.reader("rt/lowcmd", WireCommand)
        self._others = self.link.writer("rt/lowcmd", WireCommand)
        self.checked = 0
        """Commands checked in all runs."""
        self.begin(np.random.default_rng(0), "none", WatchdogClock(), 10**9)

    def begin(self, rng: Any, fault: str, clock: WatchdogClock, at: int) -> None:
        """Begin a run, whose fault starts at reading number ``at``."""
        self.rng = rng
        self.fault = fault
        self.clock = clock
        self.at = at
        self.count = 0
        self.pos = np.clip(POSE + rng.uniform(-0.3, 0.3, 12), LOW, HIGH)
        self.vel = np.zeros(12)
        self.target: np.ndarray | None = None
        self.tick0 = int(rng.integers(1000, 10**6))
        self.joint = int(rng.integers(12))
        self.published: tuple[np.ndarray, np.ndarray] = (self.pos, self.vel)
        """Angles and speeds of the newest good state that went out."""
        self.sent = b""
        self.good_at = clock.now()
        self.fault_at = math.inf
        self.damped_at = math.inf
        self.commands = 0
        self.problems: list[str] = []
        self.newest()

    @property
    def on(self) -> bool:
        """Whether the fault has begun."""
        return self.count >= self.at

    def newest(self) -> Any:
        """Return the newest command, None if there is none."""
        return self._commands.newest()

    # What goes out -------------------------------------------------------------------------------

    def publish(self) -> bool:
        """Let a control period pass and publish a state; return whether it is a good one."""
        self.count += 1
        self._move()
        numbers = self._numbers()
        true = numbers.copy()
        data = self._spoiled(numbers) if self.on else self._encoded(numbers)
        good = data is not None and data == self._encoded(true)
        if self.fault == "other controller" and self.on:
            command = bytearray(go.LowCmd([0] * 250).serialize())
            command[4 + 20] = OTHERS_MARK
            self._others.send(sample(WireCommand, bytes(command)))
            self.note_fault()
        if good:
            self.good_at = self.clock.now()
            self.published = self.pos_out, self.vel_out
            self.sent = data
        elif self.fault not in HARMLESS:
            self.note_fault()
        if data is not None:
            self._states.send(sample(WireState, data))
        return good

    def note_fault(self) -> None:
        """Note when the fault had its first effect."""
        self.fault_at = min(self.fault_at, self.clock.now())

    def _move(self) -> None:
        if self.target is not None:
            moved = np.clip(0.3 * (self.target - self.pos), -14 * PERIOD_S, 14 * PERIOD_S)
            self.vel = moved / PERIOD_S
            self.pos = self.pos + moved

    def _numbers(self) -> list[float]:
        """Return the numbers of a state with noise, before its checksum."""
        rng = self.rng
        self.pos_out = np.float32(self.pos + rng.uniform(-0.01, 0.01, 12)).astype(float)
        self.vel_out = np.float32(self.vel + rng.uniform(-1.5, 1.5, 12)).astype(float)
        torque = np.zeros(12)
        if self.target is not None:
            torque = np.clip(KP * (self.target - self.pos) - KD * self.vel, -MAX_TORQUE, MAX_TORQUE)
        state: list[float] = [0] * 349
        tilt_x, tilt_y = rng.uniform(-0.02, 0.02, 2)
        state[IMU : IMU + 4] = [1.0, tilt_x, tilt_y, 0.0]
        state[IMU + 4 : IMU + 7] = rng.uniform(-0.2, 0.2, 3).tolist()
        for i in range(12):
            start = MOTORS + NUMBERS_PER_MOTOR * i
            state[start : start + 5] = [1, self.pos_out[i], self.vel_out[i], 0.0, torque[i]]
            state[start + 8] = 40
        state[FEET : FEET + 4] = [50] * 4
        state[TICK] = self.tick0 + 20 * self.count
        return state

    def _encoded(self, state: list[float], spoil: int = 0) -> bytes:
        state[-1] = 0
        state[-1] = go.checksum(go._STATE_IN_C.pack(*state)) ^ spoil
        return b"\0\1\0\0" + go._STATE_ON_WIRE.pack(*state)

    def _spoiled(self, state: list[float]) -> bytes | None:
        """Return a state's bytes as the fault has them; None for nothing at all."""
        rng = self.rng
        first = self.count == self.at
        angle = MOTORS + NUMBERS_PER_MOTOR * self.joint + 1
        last = list(go._STATE_ON_WIRE.unpack_from(self.sent, 4)) if self.sent else state
        match self.fault:
            case "silence":
                return None
            case "one lost" if first:
                return None
            case "one twice" if first:
                return self.sent or None
            case "one with a bit error" if first:
                return self._encoded(state, 1 << int(rng.integers(32)))
            case "repeated":
                return self.sent or None
            case "bit errors":
                return self._encoded(state, 1 << int(rng.integers(32)))
            case "tick stands":
                state[TICK] = last[TICK]
            case "tick jumps ahead":
                state[TICK] += 400
            case "tick jumps back":
                state[TICK] -= 400
            case "big endian":
                return b"\0\0" + self._encoded(state)[2:]
            case "nan" | "infinite":
                bad = math.nan if self.fault == "nan" else math.inf
                state[(angle, angle + 1, angle + 3, IMU, IMU + 4)[int(rng.integers(5))]] = bad
            case "out of range":
                state[angle] = HIGH[self.joint] + rng.uniform(0.25, 5.0)
            case "zeros between" if self.count % 2 == 0:
                for i in range(12):
                    start = MOTORS + NUMBERS_PER_MOTOR * i
                    state[start + 1 : start + 5] = [0.0] * 4
            case "shifted between" if self.count % 2 == 0:
                state[angle] += 0.6 * (1 if state[angle] < POSE[self.joint] else -1)
            case "torque":
                state[angle + 3] = float(rng.choice([-1000.0, 1000.0, 1e30]))
            case "too fast":
                state[angle + 1] = float(rng.choice([-1, 1])) * 2.5 * MAX_SPEED[self.joint]
            case "speed off":
                state[angle + 1] = -state[angle + 1] - 0.6 * MAX_SPEED[self.joint]
            case "upside down":
                state[IMU : IMU + 4] = [0.0, 1.0, 0.0, 0.0]
            case "fallen":
                half = rng.uniform(math.radians(63), math.pi) / 2
                state[IMU : IMU + 4] = [math.cos(half), math.sin(half), 0.0, 0.0]
            case "attitude jumps":
                half = math.radians(55 if self.count % 2 else 0) / 2
                state[IMU : IMU + 4] = [math.cos(half), 0.0, math.sin(half), 0.0]
            case "quaternion of zeros":
                state[IMU : IMU + 4] = [0.0] * 4
            case "remote stop":
                # L2 and B
                state[REMOTE_BUTTONS : REMOTE_BUTTONS + 2] = [0x20, 0x02]
            case "frozen values":
                last[TICK] = state[TICK]
                state = last
            case "stuck joint":
                state[angle : angle + 2] = last[angle : angle + 2]
            case "frozen imu":
                state[IMU : IMU + 7] = last[IMU : IMU + 7]
            case "permuted legs":
                half = 3 * NUMBERS_PER_MOTOR
                legs = [state[MOTORS + half * i : MOTORS + half * (i + 1)] for i in range(4)]
                state[MOTORS : MOTORS + 4 * half] = [*legs[1], *legs[0], *legs[3], *legs[2]]
        return self._encoded(state)

    # What comes in -------------------------------------------------------------------------------

    def take(self, timeout_s: float) -> bool:
        """Wait for a message, check it, and follow it; return whether one came."""
        end = time.monotonic() + timeout_s
        while (message := self.newest()) is None or message.data[4 + 20] == OTHERS_MARK:
            if time.monotonic() > end:
                return False
        self._check(message.data)
        return True

    def _check(self, data: bytes) -> None:
        self.checked += 1
        motors = np.array(
            [MOTOR.unpack_from(data, FIRST_MOTOR + MOTOR_STRIDE * i) for i in range(12)]
        )
        angle, speed, torque, kp, kd = motors.T
        if data[:8] != b"\0\1\0\0\xfe\xef\xff\0" or not np.isfinite(motors).all():
            self.problems.append(f"no command: {data[:8].hex()}, {motors}")
        if (speed != 0).any() or (torque != 0).any():
            self.problems.append("a speed or torque is commanded")

        now = self.clock.now()
        if (kp == 0).all():
            if not ((angle > 0.99 * NO_POSITION).all() and (kd == 4.0).all()):
                self.problems.append(f"neither command nor damping: {motors}")
            self.damped_at = min(self.damped_at, now)
            self.target = None
            return

        if self.damped_at < math.inf:
            self.problems.append("a command after damping")
        if (kp != KP).any() or (kd != np.float32(KD)).any():
            self.problems.append(f"gains {kp} and {kd}")
        if (angle < LOW - 1e-5).any() or (angle > HIGH + 1e-5).any():
            self.problems.append(f"out of range: {angle}")
        allowed_s = BOUND_S + (SLOW[self.fault] + TRAVEL_S if self.fault in SLOW else 0.0)
        if now - self.good_at > allowed_s + 1e-9 and self.fault not in UNCERTAIN:
            self.problems.append(
                f"a command {now - self.good_at:.3f} s after the last good reading"
            )
        if self.good_at == now:
            pos, vel = self.published
            asked = KP * (angle - pos) - KD * vel
            if (np.abs(asked) > MAX_TORQUE + 1e-3).any():
                self.problems.append(f"torques {asked}")
        self.commands += 1
        self.target = np.clip(angle, LOW, HIGH)


class LockstepUnitree(UnitreeRobot):
    """The real driver, which lets the robot take a step before each reading."""

    def __init__(self, far: WireGo2, connection: Any) -> None:
        super().__init__(go2_meta())
        self.far = far
        # The connection is used for many runs: each begins undamped
        connection._damping_command = None
        with (
            patch.object(dds, "DdsParticipant", lambda *names: None),
            patch.object(dds, "DdsConnection", lambda *arguments, **keywords: connection),
        ):
            self._connection = self._open()
        self.failures_left = 0
        """How often damping will still fail."""

    def get_observation(self) -> dict[str, float]:
        good = self.far.publish()
        tick = self.far.tick0 + 20 * self.far.count
        end = time.monotonic() + (ARRIVAL_S if good else QUIET_S)
        while (reading := super().get_observation()).get("seq") != tick:
            if time.monotonic() > end:
                break
        return reading

    def send_action(self, action: Any) -> dict[str, float]:
        if self.far.fault == "driver cannot send" and self.far.on:
            self.far.note_fault()
            raise BridgeError("cannot write to rt/lowcmd")
        sent = super().send_action(action)
        self.far.take(ARRIVAL_S)
        return sent

    def damp(self) -> None:
        if self.failures_left:
            self.failures_left -= 1
            raise (RuntimeError, KeyError, OSError, BridgeError)[self.failures_left % 4]("a bug")
        super().damp()
        self.far.take(ARRIVAL_S)


def run_with_fault(far: WireGo2, connection: Any, rng: Any, fault: str) -> Controller:
    """Run the controller with a fault; raise ``AssertionError`` for anything unsafe."""
    clock = WatchdogClock()
    far.begin(rng, fault, clock, int(rng.integers(2, 100)))
    robot = LockstepUnitree(far, connection)
    phase = rng.uniform(0, 2 * math.pi, 12)
    if fault == "damping raises":
        robot.failures_left = int(rng.integers(1, 30))

    def act(policy: WavePolicy, obs: Any) -> Any:
        action = 1.2 * np.sin(0.25 * len(policy.inputs) + phase)
        if not far.on:
            return action
        match fault:
            case "policy nan":
                far.note_fault()
                action[int(rng.integers(12))] = rng.choice([math.nan, math.inf])
            case "policy raises":
                far.note_fault()
                raise RuntimeError("a bug in the policy")
            case "policy hangs":
                far.note_fault()
                clock.let_pass(rng.uniform(0.06, 0.5))
            case "damping raises":
                far.note_fault()
                controller.gate.stop("a key was pressed")
            case "noisy":
                action = rng.uniform(-4, 4, 12)
        return action

    policy = WavePolicy(go2_meta(), act=act)
    settings = RunSettings(
        hz=1 / PERIOD_S, seconds=6.0, trials=1, ready_s=0.5, soft_s=0.2, damp_s=0.06
    )
    controller = Controller(policy, robot, LeggedLayout(policy.meta), settings, clock=clock)
    clock.gate = controller.gate
    with suppress(RuntimeError):
        controller.run()

    where = f"{fault} from reading {far.at}: {controller.report.reason}"
    assert not far.problems, (where, far.problems[0])
    assert far.damped_at < math.inf, (where, "never damped")
    reason = controller.report.reason
    if fault in HARMLESS:
        assert reason == "1 trials are over", where
    elif fault in STOPPING or fault in SLOW:
        bound_s = BOUND_S + (SLOW[fault] + TRAVEL_S if fault in SLOW else 0.0)
        assert far.damped_at - far.fault_at <= bound_s + 1e-9, (where, far.damped_at, far.fault_at)
        assert reason != "1 trials are over", where
    elif fault in DAMPING:
        assert far.damped_at - far.fault_at <= 30 * PERIOD_S + BOUND_S, where
    return controller


def fuzz_dds(
    ticks: int, seed: int, domain: int, show: Callable[[int], None] = lambda ticks: None
) -> Counter[str]:
    """Run with faults on the wire until so many ticks have passed, and each fault once at least.

    Returns the number of runs with each fault, and of ``ticks``, ``commands`` and ``runs``, and how
    many runs with an uncertain fault noticed it, as ``noticed``.
    """
    rng = np.random.default_rng(seed)
    far = WireGo2(domain)
    near = DdsParticipant("lo", domain)
    connection = DdsConnection(
        near, ("rt/lowstate", go.LowState), ("rt/lowcmd", go.LowCmd), guard=False
    )
    counts = Counter[str]()
    try:
        connection.participant.wait(
            lambda: connection._reader.publishers > 0 and connection._writer.listeners > 0,
            10.0,
            lambda: "the two ends do not find each other",
        )
        while counts["ticks"] < ticks or counts["runs"] < len(FAULTS):
            fault = FAULTS[counts["runs"] % len(FAULTS)]
            controller = run_with_fault(far, connection, rng, fault)
            counts[fault] += 1
            counts["runs"] += 1
            counts["ticks"] += int(controller.report.pace["ticks"])
            if fault in UNCERTAIN:
                counts["noticed"] += controller.report.reason != "1 trials are over"
            show(counts["ticks"])
        counts["commands"] = far.checked
    finally:
        connection.close()
        far.link.close()
    return counts
