"""Where a legged robot's feet are and how fast its trunk moves, from its joints, IMU and feet: numpy only.

A leg is a hip that turns about x, then a thigh and a calf that turn about y. Leg odometry: a foot that is down stays
where it is, so the trunk moves against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

TILT, NOW = 0.2, 0.2
"""How much is taken of the IMU's tilt, the rest follows the gyroscope; and of joint velocities, the rest is how far the
feet went since the last reading."""
TRUST = np.array([0.3, 0.3, 0.7])
"""How much of the trunk's velocity is taken from what the feet say, the rest from what was known: along x, y, z."""
PARTS = ("hip", "thigh", "calf", "foot")


class Legs:
    """Forward kinematics of all legs at once; ``places`` as ``go2.legs`` gives them: leg -> part -> place, m."""

    def __init__(self, places: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        self.hip, self.thigh, self.calf, self.foot = (
            np.array([leg[part] for leg in places.values()], np.float64).T for part in PARTS
        )

    def move(self, angles: Floats, speeds: Floats) -> tuple[Floats, Floats]:
        """Return the feet's places and velocities in the trunk's frame, ``(leg, 3)`` each, m and m/s.

        For joint angles, rad, and speeds, rad/s, ``(leg, 3)``.
        """
        # p = h + X(a) w,  w = t + Y(b) u,  u = k + Y(c) f;   d(R(q) v) = q̇ e × R(q) v + R(q) dv
        (a, b, c), (da, db, dc) = angles.T, speeds.T
        f = about_y(c, self.foot)
        u, du = self.calf + f, dc * across_y(f)
        lower = about_y(b, u)
        w, dw = self.thigh + lower, db * across_y(lower) + about_y(b, du)
        leg = about_x(a, w)
        return (self.hip + leg).T, (da * across_x(leg) + about_x(a, dw)).T


def about_x(angle: Floats, v: Floats) -> Floats:
    """Turn vectors ``(3, leg)`` about x."""
    c, s = np.cos(angle), np.sin(angle)
    x, y, z = v
    return np.array([x, c * y - s * z, s * y + c * z])


def about_y(angle: Floats, v: Floats) -> Floats:
    """Turn vectors ``(3, leg)`` about y."""
    c, s = np.cos(angle), np.sin(angle)
    x, y, z = v
    return np.array([c * x + s * z, y, c * z - s * x])


def across_x(v: Floats) -> Floats:
    """Return e_x × v, ``(3, leg)``."""
    _, y, z = v
    return np.array([0 * y, -z, y])


def across_y(v: Floats) -> Floats:
    """Return e_y × v, ``(3, leg)``."""
    x, _, z = v
    return np.array([z, 0 * x, -x])


def across(v: Floats) -> Floats:
    """Return the matrix M of a vector for which ``a @ M`` is a × v."""
    x, y, z = v.tolist()
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])


def rotation(quat: Floats) -> Floats:
    """Return the rotation matrix of a quaternion, w first, of whatever length."""
    w, x, y, z = (quat / np.sqrt(quat @ quat)).tolist()
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


class Motion(NamedTuple):
    """What a legged robot knows of its motion, in its trunk's frame."""

    up: Floats
    """Direction away from gravity, ``(3,)``."""
    velocity: Floats
    """Of the trunk, m/s, ``(3,)``."""
    height: Floats
    """Of each foot over the lowest, m, ``(leg,)``."""
    depth: float
    """Of the lowest foot under the trunk, m."""
    speed: Floats
    """Of each foot over the ground, m/s, ``(leg,)``."""


class Odometry:
    """Follows the trunk's motion reading by reading; takes joint velocities and tilt to be noisy, places less so."""

    def __init__(self, legs: Legs, foot_radius: float) -> None:
        self.legs, self.radius = legs, foot_radius
        self.begin()

    def begin(self) -> None:
        """Forget all: the next reading is the first of an episode."""
        self._place: Floats | None = None
        self._up, self._velocity, self._turn = np.array([0.0, 0.0, 1.0]), np.zeros(3), np.zeros(3)
        self._down = np.zeros(self.legs.hip.shape[1], bool)

    def follow(self, angles: Floats, speeds: Floats, up: Floats, turn: Floats, down: Flags, dt: float) -> Motion:
        """Take in a reading: joints ``(leg, 3)``, up and turn ``(3,)``, which feet are down, s since the last one."""
        place, flex = self.legs.move(angles, speeds)
        if self._place is None:
            self._place, self._up, self._turn, dt = place - flex * dt, up, turn, dt
        # gravity stands still in the world: d(up)/dt = up × ω in the trunk's frame
        self._up = self._up + dt * (self._up @ across(turn)) + TILT * (up - self._up)
        self._up /= np.sqrt(self._up @ self._up)
        # each foot against the trunk: over the last period, which is what noise in places allows, and right now
        past = (place - self._place) / dt - place @ across((turn + self._turn) / 2)
        moving = past + NOW * (flex - place @ across(turn) - past)
        self._correct(moving, angles, speeds, turn, down & self._down)
        self._place, self._turn, self._down = place, turn, down
        return self._motion(place, moving)

    def _correct(self, moving: Floats, angles: Floats, speeds: Floats, turn: Floats, still: Flags) -> None:
        """Move the velocity towards what the feet that stay down say."""
        if not still.any():
            return
        # a foot is a ball that rolls: its middle moves by ω × r, of its own leg's turn
        hip, bend = angles[:, 0], speeds[:, 1] + speeds[:, 2]
        spin = turn + np.array([speeds[:, 0], np.cos(hip) * bend, np.sin(hip) * bend]).T
        said = spin @ across(self.radius * self._up) - moving
        self._velocity = self._velocity + TRUST * (said[still].mean(0) - self._velocity)

    def _motion(self, place: Floats, moving: Floats) -> Motion:
        height = place @ self._up
        over = moving + self._velocity
        along = over - np.outer(over @ self._up, self._up)
        lowest = height.min()
        speed = np.sqrt((along * along).sum(1))
        return Motion(self._up, self._velocity, height - lowest, -float(lowest), speed)
