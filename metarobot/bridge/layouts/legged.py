"""A legged robot's readings as its policy's observations, actions as joint targets, and the reward
it earned.

The twin of ``metarobot.envs.quadruped`` on a robot's own signals: the same observation, and the
same reward terms and weights, with the trunk's velocity and the feet's heights and speeds from leg
odometry. On rough ground heights are over the lowest foot, on slopes tilt is against gravity: there
terms differ from the simulator's, which knows better.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.layouts.leg_odometry import Flags, Motion, Numbers, Odometry, Vector, upward
from metarobot.bridge.policy.metadata import Meta
from metarobot.bridge.robot_interface import GYRO, QUAT, Reading

OPERATOR = ("command.x", "command.y", "command.turn")
"""Keys of a reading in which a robot tells its operator's command: forward and sideways, m/s, and
turn, rad/s."""
GAP = 0.2
"""A longer time between two readings is taken to be this long, s."""


class Moment(NamedTuple):
    """A reading in parts."""

    pos: Numbers
    vel: Numbers
    tau: Numbers
    turn: Vector
    down: Flags
    """Which feet are down, ``(leg,)``."""
    up: Vector
    """Direction away from gravity in the trunk's frame as measured."""
    command: Numbers
    motion: Motion


class Legged:
    """The layout of policies for robots of twelve joints, an IMU, and forces on their feet.

    ``command`` is what the operator asks for; a reading that holds one of its own takes its place.
    Readings are to be given in the order in which they came: each new one moves the odometry on,
    whichever method sees it first.
    """

    def __init__(self, meta: Meta, command: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        rules = meta.reward
        if rules is None or rules.get("kind") != "quadruped":
            raise BridgeError(
                f"the policy's metadata has no quadruped's reward but {rules and rules.get('kind')!r}"
            )
        self.command = list(command)
        self.terms: dict[str, float] = {}
        """What the last reward was made of, before weights."""
        self._keys = [f"{j}.{kind}" for kind in ("pos", "vel", "tau") for j in meta.joint_names]
        self._keys += [*(f"{leg}.force" for leg in rules["legs"]), *QUAT, *GYRO]
        self._values = itemgetter(*self._keys)
        self._targets = [f"{j}.pos" for j in meta.joint_names]
        self._pose, self._scale = meta.default_joint_pos, meta.action_scale
        limits = [meta.limits[j] for j in meta.joint_names]
        self._torque, self._speed = [x.torque for x in limits], [x.velocity for x in limits]
        self._told, self._dt, self._rules = bool(meta.command_names), 1 / meta.control_hz, rules
        self._odometry = Odometry(rules["legs"], rules["foot_radius"])
        self.begin()

    def needed(self) -> tuple[str, ...]:
        """Name the keys that a reading must have."""
        return ("stamp", "seq", *self._keys)

    def begin(self) -> None:
        """Forget the episode before: the next reading is the first of a new one."""
        self._odometry.begin()
        self._now: tuple[float, float, Moment] | None = None

    def observe(self, reading: Reading, last_action: Any) -> Any:
        """Return gravity, turn, joints off the pose, their velocities, the last action and the
        command, float32.
        """
        now = self._moment(reading)
        x, y, z = now.up
        off = [p - pose for p, pose in zip(now.pos, self._pose, strict=True)]
        command = now.command if self._told else (0.0, 0.0, 0.0)
        return np.array(
            [-x, -y, -z, *now.turn, *off, *now.vel, *_floats(last_action), *command], np.float32
        )

    def targets(self, action: Any) -> dict[str, float]:
        """Return the joints' targets, rad."""
        parts = zip(self._targets, self._pose, self._scale, _floats(action), strict=True)
        return {name: pose + scale * x for name, pose, scale, x in parts}

    def reward(self, before: Reading, after: Reading, action: Any, last_action: Any) -> float:
        """Return what an action earned; what the robot is told (``reward``) counts before what it
        reckons.
        """
        self._moment(before)
        now = self._moment(after)
        if "reward" in after:
            return float(after["reward"])
        self.terms = self._terms(
            now, [a - b for a, b in zip(_floats(action), _floats(last_action), strict=True)]
        )
        total: float = sum(
            [weight * self.terms[name] for name, weight in self._rules["weights"].items()]
        )
        return total

    def ended(self, reading: Reading) -> bool:
        """Say whether the robot has fallen: tilted, or sunk down between its feet."""
        motion = self._moment(reading).motion
        return bool(motion.up[2] < self._rules["upright"] or motion.depth < self._rules["lowest"])

    def _moment(self, reading: Reading) -> Moment:
        seq = reading["seq"]
        if self._now is not None and seq <= self._now[0]:
            return self._now[2]
        x = self._values(reading)
        pos, vel, force, turn = x[:12], x[12:24], x[36:40], x[44:47]
        dt = (
            self._dt
            if self._now is None
            else min(max(reading["stamp"] - self._now[1], self._dt / 4), GAP)
        )
        up, down = upward(x[40:44]), [f > self._rules["touch"] for f in force]
        motion = self._odometry.follow(_legs(pos), _legs(vel), up, turn, down, dt)
        command = [reading[k] for k in OPERATOR] if OPERATOR[0] in reading else self.command
        moment = Moment(pos, vel, x[24:36], turn, down, up, command, motion)
        self._now = seq, reading["stamp"], moment
        return moment

    def _terms(self, now: Moment, change: Numbers) -> dict[str, float]:
        """Return the terms of ``metarobot.envs.quadruped.reward``."""
        motion, wanted = now.motion, now.command
        speed, turn = motion.velocity, now.turn
        torque = [tau / most for tau, most in zip(now.tau, self._torque, strict=True)]
        fast = [vel / most for vel, most in zip(now.vel, self._speed, strict=True)]
        costs = {
            "bounce": 4 * speed[2] * speed[2],
            "wobble": 0.25 * (turn[0] * turn[0] + turn[1] * turn[1]),
            "tilt": 10 * (1 - motion.up[2]),
            "effort": 10 / 12 * _squares(torque),
            "jerk": _squares(change) / 12,
            "slip": 4
            * sum([v * v for v, down in zip(motion.speed, now.down, strict=True) if down]),
            "pose": 2
            / 12
            * _squares([p - pose for p, pose in zip(now.pos, self._pose, strict=True)]),
            "limits": 10 * sum([max(abs(x) - 0.9, 0.0) for x in (*torque, *fast)]),
        }
        off = math.hypot(speed[0] - wanted[0], speed[1] - wanted[1])
        spun, swing = turn[2] - wanted[2], 0.0
        for height, v, down in zip(motion.height, motion.speed, now.down, strict=True):
            high = min(max(height / self._rules["step_height"], 0.0), 1.0)
            swing += 0.0 if down else 0.25 * math.tanh(2 * high * high * v)
        gains = {
            "track": 1 - math.tanh(2 * off),
            "turn": math.exp(-4 * spun * spun),
            "swing": swing * min(math.hypot(wanted[0], wanted[1]) / 0.3, 1.0),
        }
        return gains | {k: -math.tanh(v) for k, v in costs.items()}


def _floats(x: Any) -> list[float]:
    return np.asarray(x).tolist()  # type: ignore[no-any-return]


def _legs(joints: Numbers) -> tuple[Numbers, ...]:
    """Part what stands for 12 joints into legs."""
    return joints[:3], joints[3:6], joints[6:9], joints[9:]


def _squares(x: Numbers) -> float:
    return sum([v * v for v in x])
