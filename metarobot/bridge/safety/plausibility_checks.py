"""Plausibility checks: whether a reading can be true of a robot with joints and an IMU.

``reading_checks`` looks at a reading's form, this module at what it says. A reading that cannot be
true ends the run, and so does a robot that has fallen: it is damped in the tick that reads it,
unless the check needs a while (``FROZEN_S`` and the times after it).

All limits are here. They were set from measurements: a simulated Go2 that walks on flat ground with
one or more broken joints, with sensor noise, 20 tasks (``scripts/plausibility_margins.py``). What
it reached is written beside each limit.

What is *not* noticed: legs that are permuted from the start on, as long as the robot stays upright;
a joint's constant offset within its range; sensors of robots without named joints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.layouts.leg_odometry import up_direction
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robot_interface import GYRO, QUAT, Reading
from metarobot.bridge.safety.command_limits import Float64Array

# In every reading

RANGE_MARGIN_RAD = 0.2
"""How far a joint may read outside its range; reached: 0.08 rad."""
LARGEST_SPEED = 2.0
"""Largest speed of a joint, as a multiple of its limit; reached: 1.3."""
LARGEST_TORQUE = 1.5
"""Largest torque of a joint, as a multiple of its limit; reached: 0.91."""
LARGEST_TILT_DEG = 60.0
"""A trunk that is tilted more has fallen; reached: 39 degrees, noise included."""
LOWEST_UP = math.cos(math.radians(LARGEST_TILT_DEG))
"""The same as the z component of the vertical in the trunk's frame."""

# From one reading to the next

SPEED_MISMATCH = 0.25
"""How much faster than both measured speeds a joint may move between two readings, as a share of
its speed limit, in addition to ``POSITION_NOISE_RAD``."""
POSITION_NOISE_RAD = 0.1
"""How far two angles may differ without any motion; reached, of both together: 0.54."""
ATTITUDE_CHANGE_RAD_S = 15.0
"""How fast the direction of gravity may turn in the trunk's frame."""
ATTITUDE_NOISE_RAD = 0.15
"""How far it may turn without any motion; reached, of both together: 0.46."""

# Over a while

MEAN_MISMATCH = 0.15
"""Largest mean difference of the measured speed and that of the angles, as a share of the speed
limit, over ``MEAN_MISMATCH_S``; reached: 0.06."""
MEAN_MISMATCH_S = 0.2
TRACKING_ERROR = 0.95
"""Largest mean distance of a joint from its target, as a share of the distance at which its drive
gives its largest torque: the drive pushes with all its might, and nothing moves; reached, by a dead
motor: 0.7."""
TRACKING_S = 1.0
"""Time constant of that mean: a joint that does not follow at all is noticed after 3 s."""
FROZEN_S = 0.1
"""How long all joints and the IMU may repeat their numbers, to the bit, under moving stamps and
while a target moves by ``FROZEN_TRAVEL_RAD`` in all."""
FROZEN_TRAVEL_RAD = 0.02
STUCK_S = 0.3
"""How long one joint may repeat its angle or speed, to the bit, while its target moves by
``STUCK_TRAVEL_RAD`` in all: it is jammed, or its sensor is stuck."""
STUCK_TRAVEL_RAD = 0.2
IMU_FROZEN_S = 0.5
"""How long the attitude or the angular velocity may repeat its numbers, to the bit, while the robot
is commanded: a working IMU is never that quiet."""

# At the start

START_TILT_DEG = 30.0
"""A robot that is tilted more is not moved: a slope is less steep, a robot on its side more."""
START_SPEED = 0.25
"""Fastest joint with which a run may begin, as a share of its speed limit."""

LARGEST_NUMBER = 1e9
"""No number of a robot is this large; beyond it the arithmetic below could overflow."""
JUMP_DT_SHARE = 0.1
"""The limit of a jump is computed anew when the time between two readings changes by more."""
SHORTEST_STEP = 0.25
"""Stamps may be coarse: two readings count as at least this share of a control period apart."""


class ImplausibleReadingError(BridgeError):
    """A reading that cannot be true, or a robot that has fallen."""


class PlausibilityChecker:
    """Check what readings say, one after the other.

    Args:
        meta: Metadata of the policy, of layout ``legged``.
        needed: Keys that each reading has. Torques and the IMU are checked if they are among them.
        period_s: Control period.
    """

    def __init__(self, meta: PolicyMetadata, needed: Sequence[str], period_s: float) -> None:
        joints = meta.joint_names
        size = len(joints)
        keys = [f"{joint}.{kind}" for kind in ("pos", "vel") for joint in joints]
        torque_keys = [f"{joint}.tau" for joint in joints]
        if set(torque_keys) <= set(needed):
            keys += torque_keys
        self._has_imu = {*QUAT, *GYRO} <= set(needed)
        imu_keys = (*QUAT, *GYRO) if self._has_imu else ()
        self._keys = (*keys, *imu_keys)
        self._values = itemgetter(*self._keys)
        self._imu_start = len(keys)
        self._joints = joints
        self._period_s = period_s

        limits = [meta.limits[joint] for joint in joints]
        max_torque = np.array([limit.torque for limit in limits])
        self._low = np.array([limit.low for limit in limits])
        self._high = np.array([limit.high for limit in limits])
        self._max_speed = np.array([limit.velocity for limit in limits])
        self._mismatch_speed = SPEED_MISMATCH * self._max_speed
        self._mean_mismatch_limit = MEAN_MISMATCH * self._max_speed

        # |x − middle| / half ≤ 1, of angle, speed and torque at once: (signal, joint)
        signals = len(keys) // size
        self._middle = np.zeros((signals, size))
        self._half = np.ones((signals, size))
        self._middle[0] = (self._low + self._high) / 2
        self._half[0] = (self._high - self._low) / 2 + RANGE_MARGIN_RAD
        self._half[1] = LARGEST_SPEED * self._max_speed
        self._half[2:] = LARGEST_TORQUE * max_torque
        # (target − q) / reach with reach = τ_max / kp; a joint without a drive follows nothing
        self._inverse_reach = np.array(meta.joint_stiffness) / max_torque

        # The latest reading, and the one before
        self._numbers = np.zeros(len(keys) + len(imu_keys))
        self._state = self._numbers[: len(keys)].reshape(signals, size)
        self.pos = self._state[0]
        """Angles in the latest reading, rad, ``(joint,)``."""
        self.vel = self._state[1]
        """Speeds in the latest reading, rad/s, ``(joint,)``."""
        self._last_state = np.zeros((signals, size))
        self._last_target = np.zeros(size)

        # What is known over a while: exponential means of the mismatch of speeds and of the
        # tracking error, ``(2, joint)``, the share of a new value in them, and their limits
        self._means = np.zeros((2, size))
        self._mean_mismatch = self._means[0]
        self._mean_tracking = self._means[1]
        self._new_share = np.array([[period_s / MEAN_MISMATCH_S], [period_s / TRACKING_S]])
        self._inverse_mean_limit = np.full((2, size), 1 / TRACKING_ERROR)
        self._inverse_mean_limit[0] = 1 / self._mean_mismatch_limit
        self._unchanged_s = np.zeros((2, size))
        self._unchanged_travel = np.zeros((2, size))

        self.used = np.zeros((signals + 3, size))
        """Share of each limit that the latest reading uses, at most 1, ``(limit, joint)``: of
        angle, speed and torque, of the mean mismatch of speeds, of the mean tracking error, and of
        a jump."""
        self._used_signals = self.used[:signals]
        self._used_means = self.used[signals : signals + 2]
        self._used_absolute = self.used[: signals + 2]
        self._jump = self.used[signals + 2]
        self._inverse_half = 1 / self._half
        self._jump_dt = math.nan
        self._inverse_jump_limit = np.zeros(size)

        # Work space
        self._change = np.zeros((signals, size))
        self._new = np.zeros((2, size))
        self._mismatch = self._new[0]
        self._error = self._new[1]
        self._half_change = np.zeros(size)
        self._speed = np.zeros(size)
        self.begin()

    def begin(self) -> None:
        """Forget all readings: the robot was restarted, and may be anywhere."""
        self._has_last = False
        self._has_last_target = False
        self._last_stamp = 0.0
        self._last_up = (0.0, 0.0, 1.0)
        self._last_imu: tuple[float, ...] = ()
        self._quat_unchanged_s = 0.0
        self._gyro_unchanged_s = 0.0
        self._means[:] = 0.0
        self._new[:] = 0.0
        self._jump[:] = 0.0
        self._forget_unchanged()

    def _forget_unchanged(self) -> None:
        """Every number has just changed: nothing stands still."""
        self._was_unchanged = False
        self._frozen_s = 0.0
        self._frozen_travel = 0.0
        self._unchanged_s[:] = 0.0
        self._unchanged_travel[:] = 0.0

    def check(
        self, reading: Reading, target: Float64Array | None, fallen_is_fault: bool = True
    ) -> None:
        """Check a new reading, whose numbers are finite.

        Args:
            reading: The reading.
            target: Targets that the joints have now, rad, ``(joint,)``; None if none were sent.
            fallen_is_fault: Whether a robot that has fallen ends the run; a simulated one restarts.

        Raises:
            ImplausibleReadingError: It cannot be true, or the robot has fallen.
        """
        values = self._values(reading)
        stamp = reading["stamp"]
        dt = max(stamp - self._last_stamp, SHORTEST_STEP * self._period_s)
        if self._has_imu:
            imu = values[self._imu_start :]
            self._check_attitude(imu, dt, target is not None, fallen_is_fault)

        self._last_state[:] = self._state
        self._numbers[:] = values
        if not math.hypot(*values) < LARGEST_NUMBER:
            i = max(range(len(values)), key=lambda k: abs(values[k]))
            raise ImplausibleReadingError(
                f"{self._keys[i]} reads {values[i]:.3g}: no number of a robot is that large"
            )
        self._use_limits(dt, target)
        # Counting is much faster than ``max`` and ``all`` on arrays that are so small
        if np.count_nonzero(self.used <= 1.0) < self.used.size:
            raise ImplausibleReadingError(self._describe_excess(dt, target))
        if self._has_last and np.count_nonzero(self._change) < self._change.size:
            self._was_unchanged = True
            self._check_unchanged(dt, target)
        elif self._was_unchanged:
            self._forget_unchanged()

        self._has_last_target = target is not None
        if target is not None:
            self._last_target[:] = target
        self._has_last = True
        self._last_stamp = stamp

    def check_start(self) -> None:
        """Check that the robot may be moved from where the latest reading shows it.

        Its joints are within their ranges, as ``check`` has seen, so the straight way to a pose in
        these ranges is too.

        Raises:
            ImplausibleReadingError: It lies on its side or back, or it moves.
        """
        tilt_deg = _tilt_deg(self._last_up[2])
        if tilt_deg > START_TILT_DEG:
            raise ImplausibleReadingError(
                f"the robot is tilted by {tilt_deg:.0f} degrees, and is moved from "
                f"{START_TILT_DEG:g} at most: put it on its feet"
            )
        share = np.abs(self.vel) / self._max_speed
        i = int(share.argmax())
        if share[i] > START_SPEED:
            raise ImplausibleReadingError(
                f"joint {self._joints[i]} turns at {self.vel[i]:.3g} rad/s before the start; "
                f"at most {START_SPEED * self._max_speed[i]:.3g}"
            )

    # The parts of a check; all that is usual takes few operations on arrays, as each costs 1 µs ---

    def _use_limits(self, dt: float, target: Float64Array | None) -> None:
        """Compute ``used``, the share of each limit that is used."""
        used = self._used_signals
        np.subtract(self._state, self._middle, out=used)
        used *= self._inverse_half

        if self._has_last:
            if not abs(dt - self._jump_dt) < JUMP_DT_SHARE * dt:
                self._jump_dt = dt
                limit = self._mismatch_speed + POSITION_NOISE_RAD / dt
                np.divide(1.0, limit, out=self._inverse_jump_limit)
            change = self._change
            np.subtract(self._state, self._last_state, out=change)

            # How much the joint's mean speed differs from the mean of both measured ones:
            # m = (q₁ − q₀) / dt − (v₀ + v₁) / 2
            half_change = self._half_change
            np.multiply(change[1], 0.5, out=half_change)
            np.subtract(self.vel, half_change, out=self._speed)
            mismatch = self._mismatch
            np.divide(change[0], dt, out=mismatch)
            mismatch -= self._speed

            # Between two readings a joint is no faster than at both, but for a margin:
            # |m| − |v₁ − v₀| / 2 ≤ margin + noise / dt
            jump = self._jump
            np.abs(mismatch, out=jump)
            np.abs(half_change, out=half_change)
            jump -= half_change
            jump *= self._inverse_jump_limit
        else:
            self._mismatch[:] = 0.0
        error = self._error
        if target is not None:
            np.subtract(target, self.pos, out=error)
            error *= self._inverse_reach
        else:
            error[:] = 0.0

        # mean += share · (new − mean), of both; ``new`` is free after it
        new = self._new
        new -= self._means
        new *= self._new_share
        self._means += new
        np.multiply(self._means, self._inverse_mean_limit, out=self._used_means)
        np.abs(self._used_absolute, out=self._used_absolute)

    def _describe_excess(self, dt: float, target: Float64Array | None) -> str:
        """Return which limit is exceeded, the first one that is, and by which joint."""
        # A jump moves the means as well, so it comes before them
        signals = len(self._state)
        order = [*range(signals), signals + 2, signals, signals + 1]
        kind = next(kind for kind in order if (self.used[kind] > 1.0).any())
        i = int(self.used[kind].argmax())
        joint = self._joints[i]
        if kind == 0:
            return (
                f"joint {joint} reads {self.pos[i]:.3g} rad, outside its range "
                f"{self._low[i]:.3g} to {self._high[i]:.3g} by more than {RANGE_MARGIN_RAD:g}"
            )
        if kind < signals:
            unit = ("rad", "rad/s", "N·m")[kind]
            return (
                f"joint {joint} reads {self._state[kind, i]:.3g} {unit}, "
                f"and can do {self._half[kind, i]:.3g} at most"
            )
        if kind == signals + 2:
            return (
                f"joint {joint} jumped by {self._change[0, i]:.3g} rad in {1e3 * dt:.0f} ms at a "
                f"measured {self.vel[i]:.3g} rad/s: a wrong sensor, or a second publisher"
            )
        if kind == signals:
            return (
                f"joint {joint}'s speed and angles differ by {abs(self._mean_mismatch[i]):.3g} "
                f"rad/s over {MEAN_MISMATCH_S:g} s; at most {self._mean_mismatch_limit[i]:.3g}"
            )
        assert target is not None
        return (
            f"joint {joint} does not follow its target, which stays "
            f"{abs(target[i] - self.pos[i]):.3g} rad away although its drive gives all it can"
        )

    def _check_attitude(
        self, imu: tuple[float, ...], dt: float, commanded: bool, fallen_is_fault: bool
    ) -> None:
        """Check the direction of gravity as the IMU measures it, unfiltered."""
        up = up_direction(imu[:4])
        # Written as "not >=" so that NaN, after an overflow, is refused as well
        if fallen_is_fault and not up[2] >= LOWEST_UP:
            raise ImplausibleReadingError(
                f"the robot has fallen: it is tilted by {_tilt_deg(up[2]):.0f} degrees, "
                f"at most {LARGEST_TILT_DEG:g}"
            )

        if self._has_last:
            turned = math.dist(up, self._last_up)
            if not turned <= ATTITUDE_CHANGE_RAD_S * dt + ATTITUDE_NOISE_RAD:
                raise ImplausibleReadingError(
                    f"the IMU's attitude jumped by {math.degrees(turned):.0f} degrees "
                    f"in {1e3 * dt:.0f} ms"
                )
            # Counted while commands are sent: a simulated robot that is held does not move
            last = self._last_imu
            if not commanded or (imu[0] != last[0] and imu[4] != last[4]):
                self._quat_unchanged_s = 0.0
                self._gyro_unchanged_s = 0.0
            else:
                unchanged = imu[:4] == last[:4]
                self._quat_unchanged_s = self._quat_unchanged_s + dt if unchanged else 0.0
                unchanged = imu[4:] == last[4:]
                self._gyro_unchanged_s = self._gyro_unchanged_s + dt if unchanged else 0.0
            if max(self._quat_unchanged_s, self._gyro_unchanged_s) >= IMU_FROZEN_S:
                raise ImplausibleReadingError(
                    f"the IMU's numbers have not changed for {IMU_FROZEN_S:g} s: it is frozen"
                )
        self._last_up = up
        self._last_imu = imu

    def _check_unchanged(self, dt: float, target: Float64Array | None) -> None:
        """Notice numbers that stand still while targets move."""
        same = self._change == 0.0
        # Without a command before this reading nothing was asked to move
        travel = np.zeros(len(self._joints))
        if target is not None and self._has_last_target:
            travel = np.abs(target - self._last_target)

        imu_moves = self._has_imu and (self._quat_unchanged_s == 0 or self._gyro_unchanged_s == 0)
        if same.all() and not imu_moves:
            self._frozen_s += dt
            self._frozen_travel += float(travel.max())
        else:
            self._frozen_s = 0.0
            self._frozen_travel = 0.0
        if self._frozen_s >= FROZEN_S and self._frozen_travel > FROZEN_TRAVEL_RAD:
            raise ImplausibleReadingError(
                f"the readings' numbers have not changed for {1e3 * self._frozen_s:.0f} ms "
                "although their stamps and the targets moved: they are frozen"
            )

        same_joint = same[:2]
        np.multiply(self._unchanged_s + dt, same_joint, out=self._unchanged_s)
        np.multiply(self._unchanged_travel + travel, same_joint, out=self._unchanged_travel)
        stuck = (self._unchanged_s >= STUCK_S) & (self._unchanged_travel > STUCK_TRAVEL_RAD)
        if stuck.any():
            kind, i = np.argwhere(stuck)[0]
            what = ("angle", "speed")[int(kind)]
            raise ImplausibleReadingError(
                f"joint {self._joints[int(i)]}'s {what} has not changed for {STUCK_S:g} s although "
                f"its target moved by {self._unchanged_travel[kind, i]:.3g} rad: it is jammed, or "
                "its sensor is stuck"
            )


def _tilt_deg(up_z: float) -> float:
    """Return the angle between the trunk's z axis and the vertical, degrees."""
    if math.isnan(up_z):
        return math.nan
    return math.degrees(math.acos(min(max(up_z, -1.0), 1.0)))
