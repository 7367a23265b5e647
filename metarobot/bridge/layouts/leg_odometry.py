"""Leg odometry: a legged robot's trunk velocity and feet from its joints, IMU and foot contacts.

A leg is a hip that turns about x, then a thigh and a calf that turn about y. A foot in contact
stays where it is, so its motion relative to the trunk is the trunk's motion reversed. Feet whose
contact lasts are averaged, and the result is low-pass filtered.

Vectors are tuples of three floats: on four legs, plain arithmetic is several times as fast as
arrays, each of whose operations costs as much as a whole leg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from metarobot.bridge.errors import BridgeError

Vector = tuple[float, float, float]
FloatSequence = Sequence[float]
BoolSequence = Sequence[bool]

TILT_GAIN = 0.2
"""How much of the IMU's gravity direction enters the estimate at each reading; the rest is the old
estimate turned with the gyroscope."""
JOINT_VELOCITY_GAIN = 0.2
"""How much of the measured joint velocities enters a foot's velocity; the rest is the difference of
its positions, which are less noisy, over the last period."""
VELOCITY_GAINS = (0.3, 0.3, 0.7)
"""How much of the velocity that the feet give enters the trunk's velocity at each reading, along x,
y, z."""


class LegKinematics:
    """A leg's forward kinematics.

    Args:
        places: Part (hip, thigh, calf, foot) -> its place in the frame of the part before it, m;
            the hip's in the trunk's frame.
    """

    def __init__(self, places: Mapping[str, Sequence[float]]) -> None:
        self.hip = _to_vector(places["hip"])
        self.thigh = _to_vector(places["thigh"])
        self.calf = _to_vector(places["calf"])
        self.foot = _to_vector(places["foot"])

    def foot_motion(self, angles: FloatSequence, speeds: FloatSequence) -> tuple[Vector, Vector]:
        """Return the foot's position, m, and velocity, m/s, in the trunk's frame.

        Args:
            angles: Joint angles, rad, ``(3,)``.
            speeds: Joint velocities, rad/s, ``(3,)``.
        """
        # thigh and calf turn in one plane:
        # p = hip + X(a) (thigh + Y(b) calf + Y(b + c) foot)
        a, b, c = angles
        a_dot, b_dot, c_dot = speeds
        shin = rotate_y(b + c, self.foot)
        lower_leg = add(rotate_y(b, self.calf), shin)
        leg = rotate_x(a, add(self.thigh, lower_leg))
        position = add(self.hip, leg)

        # ṗ = ȧ e_x × leg + X(a) (ḃ e_y × lower_leg + ċ e_y × shin)
        swing = add(scale(b_dot, cross_e_y(lower_leg)), scale(c_dot, cross_e_y(shin)))
        velocity = add(scale(a_dot, cross_e_x(leg)), rotate_x(a, swing))
        return position, velocity


def _to_vector(values: Sequence[float]) -> Vector:
    x, y, z = values
    return float(x), float(y), float(z)


def add(v: Vector, w: Vector) -> Vector:
    """Return v + w."""
    return v[0] + w[0], v[1] + w[1], v[2] + w[2]


def subtract(v: Vector, w: Vector) -> Vector:
    """Return v − w."""
    return v[0] - w[0], v[1] - w[1], v[2] - w[2]


def scale(s: float, v: Vector) -> Vector:
    """Return s v."""
    return s * v[0], s * v[1], s * v[2]


def dot(v: Vector, w: Vector) -> float:
    """Return v · w."""
    return v[0] * w[0] + v[1] * w[1] + v[2] * w[2]


def cross(v: Vector, w: Vector) -> Vector:
    """Return v × w."""
    return v[1] * w[2] - v[2] * w[1], v[2] * w[0] - v[0] * w[2], v[0] * w[1] - v[1] * w[0]


def cross_e_x(v: Vector) -> Vector:
    """Return e_x × v."""
    return 0.0, -v[2], v[1]


def cross_e_y(v: Vector) -> Vector:
    """Return e_y × v."""
    return v[2], 0.0, -v[0]


def rotate_x(angle: float, v: Vector) -> Vector:
    """Return a vector rotated about x by an angle, rad."""
    c = math.cos(angle)
    s = math.sin(angle)
    return v[0], c * v[1] - s * v[2], s * v[1] + c * v[2]


def rotate_y(angle: float, v: Vector) -> Vector:
    """Return a vector rotated about y by an angle, rad."""
    c = math.cos(angle)
    s = math.sin(angle)
    return c * v[0] + s * v[2], v[1], c * v[2] - s * v[0]


def up_direction(quat: FloatSequence) -> Vector:
    """Return the world's z axis in the frame of a body with the attitude ``quat``, w first.

    The quaternion may have any length but 0.

    Raises:
        BridgeError: It is zero.
    """
    w, x, y, z = quat
    squared_length = w * w + x * x + y * y + z * z
    if not squared_length:
        raise BridgeError("the IMU's attitude is a quaternion of zeros: it has not started yet")
    # third row of the rotation matrix
    return (
        2 * (x * z - w * y) / squared_length,
        2 * (y * z + w * x) / squared_length,
        1 - 2 * (x * x + y * y) / squared_length,
    )


class TrunkMotion(NamedTuple):
    """A legged robot's estimated motion, in its trunk's frame."""

    up: Vector
    """Direction against gravity."""
    velocity: Vector
    """The trunk's velocity, m/s."""
    height: list[float]
    """Height of each foot over the lowest foot, m."""
    depth: float
    """How far the lowest foot is below the trunk, m."""
    speed: list[float]
    """Horizontal speed of each foot over the ground, m/s."""


class LegOdometry:
    """Estimate the trunk's motion from one reading after the other.

    Args:
        places: Leg -> part -> place, m, as for ``LegKinematics``.
        foot_radius: Radius of the foot, a ball that rolls, m.
    """

    def __init__(
        self, places: Mapping[str, Mapping[str, Sequence[float]]], foot_radius: float
    ) -> None:
        self.legs = [LegKinematics(leg) for leg in places.values()]
        self.foot_radius = foot_radius
        self.begin()

    def begin(self) -> None:
        """Forget everything: the next reading is the first of an episode."""
        self._positions: list[Vector] | None = None
        self._up: Vector = (0.0, 0.0, 1.0)
        self._velocity: Vector = (0.0, 0.0, 0.0)
        self._gyro: Vector = (0.0, 0.0, 0.0)
        self._contact: BoolSequence = [False] * len(self.legs)

    def update(
        self,
        angles: Sequence[FloatSequence],
        speeds: Sequence[FloatSequence],
        up: Vector,
        gyro: Vector,
        contact: BoolSequence,
        dt: float,
    ) -> TrunkMotion:
        """Update the estimate with a reading, and return it.

        Args:
            angles: Joint angles, rad, ``(leg, 3)``.
            speeds: Joint velocities, rad/s, ``(leg, 3)``.
            up: Direction against gravity in the trunk's frame, as measured, ``(3,)``.
            gyro: Angular velocity in the trunk's frame, rad/s, ``(3,)``.
            contact: Which feet touch the ground, ``(leg,)``.
            dt: Time since the last reading, s.
        """
        feet = [leg.foot_motion(a, s) for leg, a, s in zip(self.legs, angles, speeds, strict=True)]
        positions = [position for position, _ in feet]
        if self._positions is None:
            # as if the feet had moved with their present velocity before the first reading
            self._positions = [subtract(p, scale(dt, v)) for p, v in feet]
            self._up = up
            self._gyro = gyro

        # gravity is constant in the world, so in the trunk's frame d(up)/dt = up × ω
        predicted = add(self._up, scale(dt, cross(self._up, gyro)))
        corrected = add(predicted, scale(TILT_GAIN, subtract(up, self._up)))
        if dot(up, self._up) < 0:
            # Between opposite directions there is no mean: the estimate would never leave its own
            corrected = up
        self._up = scale(1 / math.sqrt(dot(corrected, corrected)), corrected)

        # velocity of each foot relative to the trunk, v_rel = ṗ − p × ω: from the positions of the
        # last two readings, corrected by the joint velocities of this one
        mean_gyro = scale(0.5, add(gyro, self._gyro))
        relative = []
        for (position, velocity), before in zip(feet, self._positions, strict=True):
            difference = scale(1 / dt, subtract(position, before))
            from_positions = subtract(difference, cross(position, mean_gyro))
            from_joints = subtract(velocity, cross(position, gyro))
            correction = scale(JOINT_VELOCITY_GAIN, subtract(from_joints, from_positions))
            relative.append(add(from_positions, correction))

        # feet that have been in contact since the last reading do not move
        still = [i for i, touches in enumerate(contact) if touches and self._contact[i]]
        estimates = [self._trunk_velocity(angles[i], speeds[i], gyro, relative[i]) for i in still]
        self._correct_velocity(estimates)

        self._positions = positions
        self._gyro = gyro
        self._contact = contact
        return self._motion(positions, relative)

    def _trunk_velocity(
        self, angles: FloatSequence, speeds: FloatSequence, gyro: Vector, relative: Vector
    ) -> Vector:
        """Return the trunk's velocity by one foot in contact, which moves by ``relative`` to it."""
        # the foot is a ball that rolls on the ground with its own leg's angular velocity:
        # v_foot = ω_foot × r up, and v_trunk = v_foot − v_rel
        hip = angles[0]
        bend_speed = speeds[1] + speeds[2]
        joints_spin = (speeds[0], math.cos(hip) * bend_speed, math.sin(hip) * bend_speed)
        foot_spin = add(gyro, joints_spin)
        rolling = cross(foot_spin, scale(self.foot_radius, self._up))
        return subtract(rolling, relative)

    def _correct_velocity(self, estimates: Sequence[Vector]) -> None:
        """Move the velocity towards the mean of what the feet in contact give."""
        if not estimates:
            return
        corrected = []
        for axis, gain in enumerate(VELOCITY_GAINS):
            mean = sum(estimate[axis] for estimate in estimates) / len(estimates)
            old = self._velocity[axis]
            corrected.append(old + gain * (mean - old))
        x, y, z = corrected
        self._velocity = x, y, z

    def _motion(self, positions: Sequence[Vector], relative: Sequence[Vector]) -> TrunkMotion:
        up = self._up
        heights = [dot(position, up) for position in positions]
        lowest = min(heights)

        # speed over the ground: relative to the trunk, plus the trunk's, without the vertical part
        speeds = []
        for velocity in relative:
            absolute = add(velocity, self._velocity)
            horizontal = subtract(absolute, scale(dot(absolute, up), up))
            speeds.append(math.sqrt(dot(horizontal, horizontal)))
        return TrunkMotion(
            up=up,
            velocity=self._velocity,
            height=[height - lowest for height in heights],
            depth=-lowest,
            speed=speeds,
        )
