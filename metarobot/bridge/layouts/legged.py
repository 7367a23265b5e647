"""The layout ``legged``: a legged robot's sensor readings as observations, with its own reward.

This mirrors ``metarobot.envs.quadruped`` with a robot's own signals: the same observation, and the
same reward terms and weights. The trunk's velocity and the feet's heights and speeds come from leg
odometry. On rough ground heights are over the lowest foot, and on slopes tilt is against gravity:
there the terms differ from the simulator's, which knows the ground.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.layouts.leg_odometry import (
    BoolSequence,
    FloatSequence,
    LegOdometry,
    TrunkMotion,
    Vector,
    up_direction,
)
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robot_interface import GYRO, QUAT, Reading

OPERATOR_COMMAND = ("command.x", "command.y", "command.turn")
"""Optional keys of a reading: the operator's command, forward and sideways velocity, m/s, and turn
rate, rad/s."""
MAX_READING_GAP_S = 0.2
"""A longer time between two readings counts as this long, s."""
RAW_UP_MARGIN = 0.15
"""How much lower than in the filtered attitude the vertical's z component must be in the raw one to
count as a fall: three times the IMU's noise in training."""
JOINTS_PER_LEG = 3
JOINTS = 12
LEGS = 4


class LeggedReading(NamedTuple):
    """A reading in parts, with the odometry's estimate after it."""

    joint_pos: FloatSequence
    """rad, ``(12,)``."""
    joint_vel: FloatSequence
    """rad/s, ``(12,)``."""
    joint_torque: FloatSequence
    """N·m, ``(12,)``."""
    gyro: Vector
    """Angular velocity in the trunk's frame, rad/s."""
    contact: BoolSequence
    """Which feet touch the ground, ``(leg,)``."""
    up: Vector
    """Direction against gravity in the trunk's frame, as measured."""
    command: FloatSequence
    """Forward and sideways velocity, m/s, and turn rate, rad/s, that the operator asks for."""
    motion: TrunkMotion


class LeggedLayout:
    """Signals of robots with twelve joints on four legs, an IMU, and force sensors on their feet.

    Readings must come in the order in which they were measured: each new one updates the odometry,
    whichever method gets it first.

    Args:
        meta: The policy's metadata.
        command: The operator's command: forward and sideways velocity, m/s, and turn rate, rad/s. A
            reading that holds ``OPERATOR_COMMAND`` takes precedence.

    Raises:
        BridgeError: The metadata have no reward of the kind ``quadruped``.
    """

    def __init__(
        self, meta: PolicyMetadata, command: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ) -> None:
        rules = meta.reward
        if rules is None or rules.get("kind") != "quadruped":
            kind = None if rules is None else rules.get("kind")
            raise BridgeError(f"the policy's metadata has no quadruped's reward but {kind!r}")

        self.command = list(command)
        self.terms: dict[str, float] = {}
        """Terms of the last reward, before they are weighted."""
        self._keys = [
            *(f"{joint}.pos" for joint in meta.joint_names),
            *(f"{joint}.vel" for joint in meta.joint_names),
            *(f"{joint}.tau" for joint in meta.joint_names),
            *(f"{leg}.force" for leg in rules["legs"]),
            *QUAT,
            *GYRO,
        ]
        self._values = itemgetter(*self._keys)
        self._target_keys = [f"{joint}.pos" for joint in meta.joint_names]
        self._pose = meta.default_joint_pos
        self._scale = meta.action_scale
        limits = [meta.limits[joint] for joint in meta.joint_names]
        self._max_torque = [limit.torque for limit in limits]
        self._max_speed = [limit.velocity for limit in limits]
        self._command_is_observed = bool(meta.command_names)
        self._period_s = 1 / meta.control_hz
        self._rules = rules
        self._odometry = LegOdometry(rules["legs"], rules["foot_radius"])
        self.begin()

    def needed(self) -> tuple[str, ...]:
        """Return the keys that a reading must have."""
        return ("stamp", "seq", *self._keys)

    def begin(self) -> None:
        """Begin an episode: the next reading is its first."""
        self._odometry.begin()
        self._latest: LeggedReading | None = None
        self._latest_seq = 0.0
        self._latest_stamp = 0.0

    def observe(self, reading: Reading, last_action: Any) -> Any:
        """Return the observation ``(45,)``, float32.

        It holds the direction of gravity, angular velocity, joint angles from the default pose,
        joint velocities, the last action, and the operator's command (zeros if it is hidden).
        """
        now = self._update(reading)
        x, y, z = now.up
        offsets = [q - pose for q, pose in zip(now.joint_pos, self._pose, strict=True)]
        command = now.command if self._command_is_observed else (0.0, 0.0, 0.0)
        values = [
            *(-x, -y, -z),
            *now.gyro,
            *offsets,
            *now.joint_vel,
            *_to_floats(last_action),
            *command,
        ]
        return np.array(values, np.float32)

    def targets(self, action: Any) -> dict[str, float]:
        """Return the joint targets, rad, of an action ``(12,)``."""
        elements = zip(self._target_keys, self._pose, self._scale, _to_floats(action), strict=True)
        # target = pose + scale · action
        return {key: pose + scale * x for key, pose, scale, x in elements}

    def reward(self, before: Reading, after: Reading, action: Any, last_action: Any) -> float:
        """Return the reward of ``action``, which led from ``before`` to ``after``.

        A ``reward`` in the reading takes precedence over the robot's own estimate.
        """
        self._update(before)
        now = self._update(after)
        if "reward" in after:
            return float(after["reward"])

        pairs = zip(_to_floats(action), _to_floats(last_action), strict=True)
        self.terms = self._reward_terms(now, [new - old for new, old in pairs])
        weights = self._rules["weights"].items()
        total: float = sum([weight * self.terms[name] for name, weight in weights])
        return total

    def ended(self, reading: Reading) -> bool:
        """Return whether the robot has fallen: its trunk is tilted, or low between its feet."""
        now = self._update(reading)
        motion = now.motion
        upright = self._rules["upright"]
        return bool(
            motion.up[2] < upright
            or now.up[2] < upright - RAW_UP_MARGIN
            or motion.depth < self._rules["lowest"]
        )

    def _update(self, reading: Reading) -> LeggedReading:
        """Return a reading in parts; a new one updates the odometry first."""
        seq = reading["seq"]
        if self._latest is not None and seq <= self._latest_seq:
            return self._latest

        values: Sequence[float] = self._values(reading)
        joint_pos = values[:JOINTS]
        joint_vel = values[JOINTS : 2 * JOINTS]
        joint_torque = values[2 * JOINTS : 3 * JOINTS]
        feet = 3 * JOINTS
        imu = feet + LEGS
        force = values[feet:imu]
        quat = values[imu : imu + 4]
        gyro_x, gyro_y, gyro_z = values[imu + 4 :]

        dt = self._period_s
        if self._latest is not None:
            # stamps may be repeated or coarse, and a reading may be late
            dt = reading["stamp"] - self._latest_stamp
            dt = min(max(dt, self._period_s / 4), MAX_READING_GAP_S)

        up = up_direction(quat)
        gyro = (gyro_x, gyro_y, gyro_z)
        contact = [f > self._rules["touch"] for f in force]
        motion = self._odometry.update(
            _by_leg(joint_pos), _by_leg(joint_vel), up, gyro, contact, dt
        )
        command: FloatSequence = self.command
        if OPERATOR_COMMAND[0] in reading:
            command = [reading[key] for key in OPERATOR_COMMAND]

        self._latest = LeggedReading(
            joint_pos, joint_vel, joint_torque, gyro, contact, up, command, motion
        )
        self._latest_seq = seq
        self._latest_stamp = reading["stamp"]
        return self._latest

    def _reward_terms(self, now: LeggedReading, action_change: FloatSequence) -> dict[str, float]:
        """Return the terms of ``metarobot.envs.quadruped.reward``, by the same formulas."""
        motion = now.motion
        velocity = motion.velocity
        gyro = now.gyro
        wanted = now.command

        # costs, each mapped to [−1, 0] below
        torque = [tau / top for tau, top in zip(now.joint_torque, self._max_torque, strict=True)]
        speed = [vel / top for vel, top in zip(now.joint_vel, self._max_speed, strict=True)]
        offsets = [q - pose for q, pose in zip(now.joint_pos, self._pose, strict=True)]
        feet = list(zip(motion.height, motion.speed, now.contact, strict=True))
        costs = {
            "bounce": 4 * velocity[2] * velocity[2],
            "wobble": 0.25 * (gyro[0] * gyro[0] + gyro[1] * gyro[1]),
            "tilt": 10 * (1 - motion.up[2]),
            "effort": 10 / 12 * _sum_of_squares(torque),
            "jerk": _sum_of_squares(action_change) / 12,
            "slip": 4 * sum([v * v for _, v, touches in feet if touches]),
            "pose": 2 / 12 * _sum_of_squares(offsets),
            "limits": 10 * sum([max(abs(x) - 0.9, 0.0) for x in (*torque, *speed)]),
        }

        # a foot that swings is rewarded for being high and fast, unless the command is to stand
        swing = 0.0
        for height, foot_speed, touches in feet:
            if not touches:
                relative_height = min(max(height / self._rules["step_height"], 0.0), 1.0)
                swing += 0.25 * math.tanh(2 * relative_height * relative_height * foot_speed)
        velocity_error = math.hypot(velocity[0] - wanted[0], velocity[1] - wanted[1])
        turn_error = gyro[2] - wanted[2]
        gains = {
            "track": 1 - math.tanh(2 * velocity_error),
            "turn": math.exp(-4 * turn_error * turn_error),
            "swing": swing * min(math.hypot(wanted[0], wanted[1]) / 0.3, 1.0),
        }
        return gains | {name: -math.tanh(cost) for name, cost in costs.items()}


def _to_floats(x: Any) -> list[float]:
    return np.asarray(x).tolist()  # type: ignore[no-any-return]


def _by_leg(joints: FloatSequence) -> tuple[FloatSequence, ...]:
    """Split the values of twelve joints by leg, ``(4, 3)``."""
    return tuple(joints[i : i + JOINTS_PER_LEG] for i in range(0, JOINTS, JOINTS_PER_LEG))


def _sum_of_squares(x: FloatSequence) -> float:
    return sum([v * v for v in x])
