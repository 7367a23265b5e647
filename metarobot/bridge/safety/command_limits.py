"""Command limits: every command is moved into the limits of its joints before the gate sends it.

This module decides *which* target is sent; ``command_gate`` decides *whether* anything is sent.
Whatever comes in, what goes out is finite and within all limits, or nothing goes out.

Each limit is an interval for the target of one joint. A command is moved into the intersection of
the intervals. Where that is empty, or an input is not a number, ``UnsafeCommandError`` ends the run
and the robot is damped. A PD drive's torque is

    τ = kp (target − q) − kd q̇

so a torque limit is an interval for the target too:

    |τ| ≤ τ_max   ⇔   target ∈ q + (kd q̇ ± τ_max) / kp
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import PolicyMetadata

Float64Array = NDArray[np.float64]

LIMIT_KINDS = ("position", "velocity", "torque", "rate")
"""Kinds of limits, in the order of the rows of ``CommandLimiter.hit`` and of the log's bits."""
POSITION = 0
VELOCITY = 1
TORQUE = 2
RATE = 3

KIND_BITS = 1 << np.arange(len(LIMIT_KINDS))
"""One bit per kind of limit, ``(kind,)``."""

LARGEST_PLAUSIBLE = 1e9
"""No angle, velocity or command of a robot is this large; such a number counts as infinite.

The bound also keeps the squares inside ``math.hypot`` and the sums below from overflowing."""


class UnsafeCommandError(BridgeError):
    """A command that no limit can make safe."""


class CommandLimiter:
    """Move commands into their limits, and count per joint how often each limit moved one.

    - Position: the target stays in the joint's range.
    - Velocity: a joint faster than its limit is not driven further in that direction.
    - Torque: the torque that the PD drive would give now stays under its limit.
    - Rate: a target moves at most ``rate`` times as fast as its joint may. Position, velocity and
      torque come after it and may move the target faster: they protect the robot, the rate limit
      only smooths.

    Args:
        meta: Metadata of the policy: joints, limits, and the drives' gains ``kp`` and ``kd``.
            Commands of a ``direct`` policy have no drives, and only a position range.
        period_s: Control period.
        rate: Fastest motion of a target, as a multiple of the joint's speed limit.
    """

    def __init__(self, meta: PolicyMetadata, period_s: float, rate: float = 2.0) -> None:
        if meta.layout == "legged":
            limits = [meta.limits[joint] for joint in meta.joint_names]
            self.names = tuple(f"{joint}.pos" for joint in meta.joint_names)
            """Keys of the command, in the order of all arrays."""
            self.joints = meta.joint_names
            """The same without suffix, for reports."""
            low = [limit.low for limit in limits]
            high = [limit.high for limit in limits]
            velocity = [limit.velocity for limit in limits]
            torque = [limit.torque for limit in limits]
            stiffness = list(meta.joint_stiffness)
            damping = list(meta.joint_damping)
        else:
            self.names = meta.action.names
            self.joints = meta.action.names
            low = list(meta.action.low)
            high = list(meta.action.high)
            velocity = [math.inf] * len(self.names)
            torque = [math.inf] * len(self.names)
            stiffness = [0.0] * len(self.names)
            damping = [0.0] * len(self.names)

        size = len(self.names)
        self.low = np.array(low, np.float64)
        self.high = np.array(high, np.float64)
        self.velocity = np.array(velocity, np.float64)

        # A joint without stiffness has no drive: its torque does not depend on the target, so the
        # torque interval is (−inf, inf) and its centre is the measured position.
        kp = np.array(stiffness, np.float64)
        kd = np.array(damping, np.float64)
        driven = kp > 0
        # torque_reach = τ_max / kp, rad
        self._torque_reach = np.divide(
            np.array(torque, np.float64), kp, out=np.full(size, np.inf), where=driven
        )
        # damping_time = kd / kp, s
        self._damping_time_s = np.divide(kd, kp, out=np.zeros(size), where=driven)
        # rate_step = rate · q̇_max · Δt, rad per control step
        self._rate_step = self.velocity * period_s * rate

        self.counts = np.zeros((len(LIMIT_KINDS), size), np.int64)
        """How often each kind of limit moved each element of the command, ``(kind, joint)``."""
        self.hit = np.zeros((len(LIMIT_KINDS), size), bool)
        """Where the latest command was moved, ``(kind, joint)``."""
        self.out = np.zeros(size)
        """The latest command that was let through, ``(joint,)``."""
        self._last = np.full(size, np.nan)

        # Work space, so that a control step allocates as little as possible
        self._lower = np.zeros(size)
        self._upper = np.zeros(size)
        self._zero_torque = np.zeros(size)
        self._scratch = np.zeros(size)

    def begin(self, at: Float64Array | None = None) -> None:
        """Forget the last command; ``at`` is where the targets stand now, ``(joint,)``.

        From ``at`` on, targets move at their limited rate. Without it the next command may be
        anywhere within the other limits.
        """
        self._last[:] = np.nan if at is None else at

    def __call__(self, target: Float64Array, pos: Float64Array, vel: Float64Array) -> Float64Array:
        """Return the safe command for ``target`` at joint angles ``pos`` and velocities ``vel``.

        All are ``(joint,)``, rad and rad/s. The returned array belongs to the limiter and is
        overwritten by the next call.

        Raises:
            UnsafeCommandError: an input is not finite, or the limits contradict each other, as
                they do for a joint that reads far outside its range.
        """
        # One norm over all inputs is finite only if all of them are. Written as "not <" so that
        # NaN, which compares false with everything, is refused as well.
        norm = math.hypot(*target.tolist(), *pos.tolist(), *vel.tolist())
        if not norm < LARGEST_PLAUSIBLE:
            raise UnsafeCommandError("a target, joint angle or velocity is not finite")

        out = self.out
        low = self._lower
        high = self._upper
        out[:] = target

        # Rate first: it is the only limit that the ones after it may override.
        # target ∈ last ± rate · q̇_max · Δt
        np.subtract(self._last, self._rate_step, out=low)
        np.add(self._last, self._rate_step, out=high)
        self._move_into(low, high, RATE)

        self._move_into(self.low, self.high, POSITION)

        # The target at which the drive gives no torque: q + kd q̇ / kp
        np.multiply(self._damping_time_s, vel, out=self._zero_torque)
        self._zero_torque += pos

        # Velocity: on the far side of the zero-torque target the drive only brakes. Rare, hence the
        # branch: most steps pay for one comparison only.
        self.hit[VELOCITY] = False
        if (np.abs(vel, out=self._scratch) > self.velocity).any():
            low[:] = np.where(vel < -self.velocity, self._zero_torque, -np.inf)
            high[:] = np.where(vel > self.velocity, self._zero_torque, np.inf)
            self._move_into(low, high, VELOCITY)

        # Torque last, because it must hold whatever the others did.
        # target ∈ (q + kd q̇ / kp) ± τ_max / kp
        np.subtract(self._zero_torque, self._torque_reach, out=low)
        np.add(self._zero_torque, self._torque_reach, out=high)
        self._move_into(low, high, TORQUE)

        # Velocity and torque may have moved the target out of the joint's range again: then no
        # target satisfies all limits, and the only safe thing left is to damp.
        if self.hit[VELOCITY : TORQUE + 1].any():
            outside = (out < self.low) | (out > self.high)
            if outside.any():
                joint = self.joints[int(np.argmax(outside))]
                raise UnsafeCommandError(
                    f"joint {joint} is so far outside its range, or so fast, that no target is safe"
                )

        self._last[:] = out
        self.counts += self.hit
        return out

    def bits(self) -> NDArray[np.int64]:
        """Return where the latest command was moved, ``(joint,)``: a bit for each limit kind."""
        return KIND_BITS @ self.hit

    def report(self) -> dict[str, dict[str, int]]:
        """Return joint -> kind of limit -> how many commands it moved; zeros are left out."""
        report: dict[str, dict[str, int]] = {}
        for joint, counts in zip(self.joints, self.counts.T.tolist(), strict=True):
            moved = {kind: n for kind, n in zip(LIMIT_KINDS, counts, strict=True) if n}
            if moved:
                report[joint] = moved
        return report

    def _move_into(self, low: Float64Array, high: Float64Array, kind: int) -> None:
        """Move the command into ``[low, high]`` and note where; a bound that is NaN is no bound."""
        out = self.out
        moved = self._scratch
        # fmax and fmin ignore NaN, which the rate limit's bounds are on the first command
        np.fmax(out, low, out=moved)
        np.fmin(moved, high, out=moved)
        np.not_equal(moved, out, out=self.hit[kind])
        out[:] = moved


def blend(
    start: Float64Array, end: Float64Array, progress: float, out: Float64Array
) -> Float64Array:
    """Write to ``out`` a point on the way from ``start`` to ``end``, at rest at both ends.

    The share of the way is the smoothstep s = p² (3 − 2 p) of ``progress`` p, clipped to [0, 1].
    """
    p = min(max(progress, 0.0), 1.0)
    np.subtract(end, start, out=out)
    out *= p * p * (3 - 2 * p)
    out += start
    return out
