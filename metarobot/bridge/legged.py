"""A legged robot's readings as its policy's observations, actions as joint targets, and the reward it earned.

The twin of ``metarobot.envs.quadruped`` on a robot's own signals: the same observation, and the same reward terms and
weights, with the trunk's velocity and the feet's heights and speeds from leg odometry. On rough ground heights are over
the lowest foot, on slopes tilt is against gravity: there terms differ from the simulator's, which knows better.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.meta import Meta
from metarobot.bridge.odometry import Flags, Floats, Legs, Motion, Odometry, rotation
from metarobot.bridge.robot import GYRO, QUAT, Reading

OPERATOR = ("command.x", "command.y", "command.turn")
"""Keys of a reading in which a robot tells its operator's command: forward and sideways, m/s, and turn, rad/s."""
GAP = 0.2
"""A longer time between two readings is taken to be this long, s."""


class Moment(NamedTuple):
    """A reading as arrays."""

    pos: Floats
    vel: Floats
    tau: Floats
    turn: Floats
    down: Flags
    """Which feet are down, ``(leg,)``."""
    up: Floats
    """Direction away from gravity in the trunk's frame as measured, ``(3,)``."""
    command: Floats
    motion: Motion


class Legged:
    """The layout of policies for robots of twelve joints, an IMU, and forces on their feet.

    ``command`` is what the operator asks for; a reading that holds one of its own takes its place. Readings are to be
    given in the order in which they came: each new one moves the odometry on, whichever method sees it first.
    """

    def __init__(self, meta: Meta, command: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        rules = meta.reward
        if rules is None or rules.get("kind") != "quadruped":
            raise BridgeError(f"the policy's metadata has no quadruped's reward but {rules and rules.get('kind')!r}")
        self.command = np.array(command, np.float64)
        self.terms: dict[str, float] = {}
        """What the last reward was made of, before weights."""
        self._keys = [f"{j}.{kind}" for kind in ("pos", "vel", "tau") for j in meta.joint_names]
        self._keys += [*(f"{leg}.force" for leg in rules["legs"]), *QUAT, *GYRO]
        self._targets = [f"{j}.pos" for j in meta.joint_names]
        self._pose, self._scale = np.array(meta.default_joint_pos), np.array(meta.action_scale)
        limits = [meta.limits[j] for j in meta.joint_names]
        self._torque, self._speed = np.array([x.torque for x in limits]), np.array([x.velocity for x in limits])
        self._told, self._dt, self._rules = bool(meta.command_names), 1 / meta.control_hz, rules
        self._odometry = Odometry(Legs(rules["legs"]), rules["foot_radius"])
        self.begin()

    def needed(self) -> tuple[str, ...]:
        """Name the keys that a reading must have."""
        return ("stamp", "seq", *self._keys)

    def begin(self) -> None:
        """Forget the episode before: the next reading is the first of a new one."""
        self._odometry.begin()
        self._now: tuple[float, float, Moment] | None = None

    def observe(self, reading: Reading, last_action: Any) -> Any:
        """Return gravity, turn, joints off the pose, their velocities, the last action and the command, float32."""
        now = self._moment(reading)
        command = now.command if self._told else np.zeros(3)
        parts = (-now.up, now.turn, now.pos - self._pose, now.vel, last_action, command)
        return np.concatenate(parts).astype(np.float32)

    def targets(self, action: Any) -> dict[str, float]:
        """Return the joints' targets, rad."""
        wanted = self._pose + self._scale * np.asarray(action, np.float64)
        return dict(zip(self._targets, wanted.tolist(), strict=True))

    def reward(self, before: Reading, after: Reading, action: Any, last_action: Any) -> float:
        """Return what an action earned; what the robot is told (``reward``) counts before what it reckons."""
        self._moment(before)
        now = self._moment(after)
        if "reward" in after:
            return float(after["reward"])
        self.terms = self._terms(now, np.asarray(action, np.float64) - np.asarray(last_action, np.float64))
        return float(sum(weight * self.terms[name] for name, weight in self._rules["weights"].items()))

    def ended(self, reading: Reading) -> bool:
        """Say whether the robot has fallen: tilted, or sunk down between its feet."""
        motion = self._moment(reading).motion
        return bool(motion.up[2] < self._rules["upright"] or motion.depth < self._rules["lowest"])

    def _moment(self, reading: Reading) -> Moment:
        seq = reading["seq"]
        if self._now is not None and seq <= self._now[0]:
            return self._now[2]
        x = np.fromiter(map(reading.__getitem__, self._keys), np.float64, len(self._keys))
        pos, vel, tau, force, quat, turn = np.split(x, (12, 24, 36, 40, 44))
        dt = self._dt if self._now is None else min(max(reading["stamp"] - self._now[1], self._dt / 4), GAP)
        up, down = rotation(quat)[2], force > self._rules["touch"]
        motion = self._odometry.follow(pos.reshape(4, 3), vel.reshape(4, 3), up, turn, down, dt)
        command = np.array([reading[k] for k in OPERATOR]) if OPERATOR[0] in reading else self.command
        moment = Moment(pos, vel, tau, turn, down, up, command, motion)
        self._now = seq, reading["stamp"], moment
        return moment

    def _terms(self, now: Moment, change: Floats) -> dict[str, float]:
        """Return the terms of ``metarobot.envs.quadruped.reward``."""
        motion, wanted, torque = now.motion, now.command, now.tau / self._torque
        speed, turn = motion.velocity, now.turn
        over = np.abs(np.concatenate([torque, now.vel / self._speed])) - 0.9
        costs = {
            "bounce": 4 * speed[2] ** 2,
            "wobble": 0.25 * (turn[0] ** 2 + turn[1] ** 2),
            "tilt": 10 * (1 - motion.up[2]),
            "effort": 10 / 12 * torque @ torque,
            "jerk": change @ change / 12,
            "slip": 4 * now.down @ motion.speed**2,
            "pose": 2 / 12 * np.square(now.pos - self._pose).sum(),
            "limits": 10 * np.maximum(over, 0).sum(),
        }
        off = np.hypot(speed[0] - wanted[0], speed[1] - wanted[1])
        high = np.clip(motion.height / self._rules["step_height"], 0, 1)
        swing = 0.25 * np.tanh(2 * np.logical_not(now.down) * high**2 * motion.speed).sum()
        gains = {
            "track": 1 - np.tanh(2 * off),
            "turn": np.exp(-4 * (turn[2] - wanted[2]) ** 2),
            "swing": swing * min(np.hypot(wanted[0], wanted[1]) / 0.3, 1.0),
        }
        return {k: float(v) for k, v in gains.items()} | {k: -float(np.tanh(v)) for k, v in costs.items()}
