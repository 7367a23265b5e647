"""What every command passes before it leaves: whatever comes in, what goes out is finite and within
limits.

Each limit is an interval for a joint's target; a command is moved into their intersection, and
where that is empty, or anything is not a number, nothing goes out and the robot is damped. A
drive's torque is

    τ = kp (target − q) − kd q̇

so a limit of torque is an interval too: target ∈ q + (kd q̇ ± τ_max) / kp.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import Meta

Array = NDArray[np.float64]

KINDS = ("position", "velocity", "torque", "rate")
"""What a command can be limited by."""
_BITS = 1 << np.arange(len(KINDS))


ABSURD = 1e9
"""No angles, velocities or commands of a robot are this large: such numbers are as good as
infinite."""


class UnsafeError(BridgeError):
    """A command that no limit can make safe."""


class Filter:
    """Moves commands into their limits, and counts per joint what had to be moved.

    Position: the joint's range. Velocity: a joint that is faster than its limit is not driven on.
    Torque: what the drive would give now stays under its limit. Rate: a target moves at most
    ``rate`` times as fast as its joint may, except where the other limits make it. ``kp`` and
    ``kd`` are the drives' gains; commands without drives (``direct``) have a range only.
    """

    def __init__(self, meta: Meta, period: float, rate: float = 2.0) -> None:
        legged = meta.layout == "legged"
        self.names = tuple(f"{j}.pos" for j in meta.joint_names) if legged else meta.action.names
        """Keys of the command, in the order of all arrays."""
        self.joints = meta.joint_names if legged else meta.action.names
        bounds = [meta.limits[j] for j in meta.joint_names] if legged else []
        n, free = len(self.names), np.full(len(self.names), np.inf)
        self.low = np.array([b.low for b in bounds] if legged else meta.action.low, np.float64)
        self.high = np.array([b.high for b in bounds] if legged else meta.action.high, np.float64)
        self.velocity = np.array([b.velocity for b in bounds], np.float64) if legged else free
        torque = np.array([b.torque for b in bounds], np.float64) if legged else free
        kp = np.array(meta.joint_stiffness, np.float64) if legged else np.zeros(n)
        kd = np.array(meta.joint_damping, np.float64) if legged else np.zeros(n)
        driven = kp > 0
        self._reach = np.divide(torque, kp, out=free.copy(), where=driven)  # τ_max / kp, rad
        self._brake = np.divide(kd, kp, out=np.zeros(n), where=driven)  # kd / kp, s
        self._step = self.velocity * period * rate
        self.counts = np.zeros((len(KINDS), n), np.int64)
        """How often each kind of limit moved each element of the command."""
        self.hit = np.zeros((len(KINDS), n), bool)
        """Where the latest command was moved."""
        self.out = np.zeros(n)
        """The latest command that was let through."""
        self._last = np.full(n, np.nan)
        self._lower, self._upper, self._centre, self._hold = (np.zeros(n) for _ in range(4))

    def begin(self, at: Array | None = None) -> None:
        """Forget the last command; ``at`` is where the targets stand, from which they move at their
        rate.
        """
        self._last[:] = np.nan if at is None else at

    def __call__(self, target: Array, pos: Array, vel: Array) -> Array:
        """Return what may be sent for ``target``, ``(joint,)``, at joint angles ``pos`` and
        velocities ``vel``.

        The array belongs to the filter. Raises ``UnsafeError`` for what is not finite, and where
        limits contradict each other, as they do for a joint that reads far outside its range.
        """
        if (
            not math.hypot(*target.tolist(), *pos.tolist(), *vel.tolist()) < ABSURD
        ):  # so for NaN too
            raise UnsafeError("a target, joint angle or velocity is not finite")
        out, low, high = self.out, self._lower, self._upper
        out[:] = target
        np.subtract(self._last, self._step, out=low)
        np.add(self._last, self._step, out=high)
        self._into(low, high, 3)
        self._into(self.low, self.high, 0)
        np.multiply(self._brake, vel, out=self._centre)
        self._centre += pos  # where the drive would give no torque
        self.hit[1] = False
        if (np.abs(vel, out=self._hold) > self.velocity).any():
            low[:] = np.where(vel < -self.velocity, self._centre, -np.inf)
            high[:] = np.where(vel > self.velocity, self._centre, np.inf)
            self._into(low, high, 1)
        np.subtract(self._centre, self._reach, out=low)
        np.add(self._centre, self._reach, out=high)
        self._into(low, high, 2)
        if self.hit[
            1:3
        ].any():  # position may have given way: then the limits contradict each other
            outside = (out < self.low) | (out > self.high)
            if outside.any():
                joint = self.joints[int(np.argmax(outside))]
                raise UnsafeError(
                    f"joint {joint} is so far outside its range, or so fast, that no target is safe"
                )
        self._last[:] = out
        self.counts += self.hit
        return out

    def bits(self) -> NDArray[np.int64]:
        """Return where the latest command was moved, ``(joint,)``, a bit for each of ``KINDS``."""
        return _BITS @ self.hit

    def report(self) -> dict[str, dict[str, int]]:
        """Return joint -> kind of limit -> how many commands it moved, of those it moved."""
        rows = zip(self.joints, self.counts.T.tolist(), strict=True)
        return {
            joint: {k: n for k, n in zip(KINDS, row, strict=True) if n}
            for joint, row in rows
            if any(row)
        }

    def _into(self, low: Array, high: Array, kind: int) -> None:
        """Move the command into an interval and note where; an end that is NaN is no end."""
        out, hold = self.out, self._hold
        np.fmax(out, low, out=hold)
        np.fmin(hold, high, out=hold)
        np.not_equal(hold, out, out=self.hit[kind])
        out[:] = hold


def blend(start: Array, end: Array, progress: float, out: Array) -> Array:
    """Go from ``start`` to ``end`` with rest at both ends, ``progress`` in [0, 1]: s = p² (3 − 2
    p).
    """
    p = min(max(progress, 0.0), 1.0)
    np.subtract(end, start, out=out)
    out *= p * p * (3 - 2 * p)
    out += start
    return out
