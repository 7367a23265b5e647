"""Where a legged robot's feet are and how fast its trunk moves, from its joints, IMU and feet.

A leg is a hip that turns about x, then a thigh and a calf that turn about y. Leg odometry: a foot
that is down stays where it is, so the trunk moves against it. Vectors are three floats: on four
legs plain arithmetic is several times as fast as arrays, each of whose operations costs as much as
a leg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from metarobot.bridge.errors import BridgeError

Vector = tuple[float, float, float]
Numbers = Sequence[float]
Flags = Sequence[bool]

TILT, NOW = 0.2, 0.2
"""How much is taken of the IMU's tilt, the rest follows the gyroscope; and of joint velocities, the
rest is how far the feet went since the last reading."""
TRUST = (0.3, 0.3, 0.7)
"""How much of the trunk's velocity is taken from what the feet say, the rest from what was known:
along x, y, z."""
PARTS = ("hip", "thigh", "calf", "foot")


class Leg:
    """A leg's forward kinematics; ``places`` as ``go2.legs`` gives them: part -> place, m."""

    def __init__(self, places: Mapping[str, Sequence[float]]) -> None:
        self.hip, self.thigh, self.calf, self.foot = (
            (float(x), float(y), float(z)) for x, y, z in (places[part] for part in PARTS)
        )

    def move(self, angles: Numbers, speeds: Numbers) -> tuple[Vector, Vector]:
        """Return the foot's place and velocity in the trunk's frame, m and m/s.

        For joint angles, rad, and speeds, rad/s, ``(3,)``.
        """
        # thigh and calf turn in one plane: p = h + X(a) (t + Y(b) k + Y(b + c) f)
        a, b, c = angles
        da, db, dc = speeds
        shin = about_y(b + c, self.foot)
        lower = plus(about_y(b, self.calf), shin)
        leg = about_x(a, plus(self.thigh, lower))
        swing = plus(times(db, across_y(lower)), times(dc, across_y(shin)))
        return plus(self.hip, leg), plus(times(da, across_x(leg)), about_x(a, swing))


def plus(v: Vector, w: Vector) -> Vector:
    """Return v + w."""
    return v[0] + w[0], v[1] + w[1], v[2] + w[2]


def minus(v: Vector, w: Vector) -> Vector:
    """Return v − w."""
    return v[0] - w[0], v[1] - w[1], v[2] - w[2]


def times(s: float, v: Vector) -> Vector:
    """Return s v."""
    return s * v[0], s * v[1], s * v[2]


def dot(v: Vector, w: Vector) -> float:
    """Return v · w."""
    return v[0] * w[0] + v[1] * w[1] + v[2] * w[2]


def across(v: Vector, w: Vector) -> Vector:
    """Return v × w."""
    return v[1] * w[2] - v[2] * w[1], v[2] * w[0] - v[0] * w[2], v[0] * w[1] - v[1] * w[0]


def across_x(v: Vector) -> Vector:
    """Return e_x × v."""
    return 0.0, -v[2], v[1]


def across_y(v: Vector) -> Vector:
    """Return e_y × v."""
    return v[2], 0.0, -v[0]


def about_x(angle: float, v: Vector) -> Vector:
    """Turn a vector about x."""
    c, s = math.cos(angle), math.sin(angle)
    return v[0], c * v[1] - s * v[2], s * v[1] + c * v[2]


def about_y(angle: float, v: Vector) -> Vector:
    """Turn a vector about y."""
    c, s = math.cos(angle), math.sin(angle)
    return c * v[0] + s * v[2], v[1], c * v[2] - s * v[0]


def upward(quat: Numbers) -> Vector:
    """Return what is up in the frame of a body whose attitude is a quaternion, w first, of whatever
    length but 0.
    """
    w, x, y, z = quat
    unit = w * w + x * x + y * y + z * z
    if not unit:
        raise BridgeError("the IMU's attitude is a quaternion of zeros: it has not started yet")
    return 2 * (x * z - w * y) / unit, 2 * (y * z + w * x) / unit, 1 - 2 * (x * x + y * y) / unit


class Motion(NamedTuple):
    """What a legged robot knows of its motion, in its trunk's frame."""

    up: Vector
    """Direction away from gravity."""
    velocity: Vector
    """Of the trunk, m/s."""
    height: list[float]
    """Of each foot over the lowest, m."""
    depth: float
    """Of the lowest foot under the trunk, m."""
    speed: list[float]
    """Of each foot over the ground, m/s."""


class Odometry:
    """Follows the trunk's motion reading by reading; takes joint velocities and tilt to be noisy,
    places less so.

    ``places`` is leg -> part -> place, m.
    """

    def __init__(
        self, places: Mapping[str, Mapping[str, Sequence[float]]], foot_radius: float
    ) -> None:
        self.legs, self.radius = [Leg(leg) for leg in places.values()], foot_radius
        self.begin()

    def begin(self) -> None:
        """Forget all: the next reading is the first of an episode."""
        self._place: list[Vector] | None = None
        self._up: Vector = (0.0, 0.0, 1.0)
        self._velocity: Vector = (0.0, 0.0, 0.0)
        self._turn: Vector = (0.0, 0.0, 0.0)
        self._down: Flags = [False] * len(self.legs)

    def follow(
        self,
        angles: Sequence[Numbers],
        speeds: Sequence[Numbers],
        up: Vector,
        turn: Vector,
        down: Flags,
        dt: float,
    ) -> Motion:
        """Take in a reading: joints ``(leg, 3)``, up and turn ``(3,)``, which feet are down, s
        since the last one.
        """
        moved = [leg.move(a, s) for leg, a, s in zip(self.legs, angles, speeds, strict=True)]
        place = [p for p, _ in moved]
        if self._place is None:
            self._place, self._up, self._turn = [minus(p, times(dt, v)) for p, v in moved], up, turn
        # gravity stands still in the world: d(up)/dt = up × ω in the trunk's frame
        tilted = plus(self._up, times(dt, across(self._up, turn)))
        tilted = plus(tilted, times(TILT, minus(up, self._up)))
        self._up = times(1 / math.sqrt(dot(tilted, tilted)), tilted)
        middle, moving = times(0.5, plus(turn, self._turn)), []
        for (p, flex), before in zip(moved, self._place, strict=True):
            # each foot against the trunk: over the last period, which is what noise in places
            # allows, and right now
            past = minus(times(1 / dt, minus(p, before)), across(p, middle))
            moving.append(plus(past, times(NOW, minus(minus(flex, across(p, turn)), past))))
        still = [i for i, down_now in enumerate(down) if down_now and self._down[i]]
        self._correct([self._said(angles[i], speeds[i], turn, moving[i]) for i in still])
        self._place, self._turn, self._down = place, turn, down
        return self._motion(place, moving)

    def _said(self, angles: Numbers, speeds: Numbers, turn: Vector, moving: Vector) -> Vector:
        """Return how fast the trunk moves by a foot that stays down."""
        # a foot is a ball that rolls: its middle moves by ω × r, of its own leg's turn
        hip, bend = angles[0], speeds[1] + speeds[2]
        spin = plus(turn, (speeds[0], math.cos(hip) * bend, math.sin(hip) * bend))
        return minus(across(spin, times(self.radius, self._up)), moving)

    def _correct(self, said: Sequence[Vector]) -> None:
        """Move the velocity towards what the feet that stay down say."""
        if said:
            means = (sum(along) / len(said) for along in zip(*said, strict=True))
            x, y, z = (
                v + trust * (mean - v)
                for v, trust, mean in zip(self._velocity, TRUST, means, strict=True)
            )
            self._velocity = x, y, z

    def _motion(self, place: Sequence[Vector], moving: Sequence[Vector]) -> Motion:
        up, height = self._up, [dot(p, self._up) for p in place]
        over = [plus(m, self._velocity) for m in moving]
        along = [minus(v, times(dot(v, up), up)) for v in over]
        lowest = min(height)
        speed = [math.sqrt(dot(v, v)) for v in along]
        return Motion(up, self._velocity, [h - lowest for h in height], -lowest, speed)
