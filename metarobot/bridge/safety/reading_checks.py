"""Reading checks: which of a robot's readings the controller may act on.

A reading must be complete and finite, newer than the one before, and stamped by a clock that does
not jump. A reading that is merely old is ignored, and ``command_gate`` damps if no new one comes in
time. A reading that is wrong ends the run at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Reading

CLOCK_JUMP_S = 0.2
"""Largest change of the offset between the robot's clock and ours.

Large enough for a reading that was held up in a network, small enough that nobody walks on a state
that is a fifth of a second old."""
CLOCK_DRIFT = 1e-3
"""How fast the offset may change without counting as a jump, s/s.

Two quartz clocks drift apart by 1e-4 at most, so ten times that is never needed; a clock that is
slowed down or sped up more than that is noticed when it adds up to ``CLOCK_JUMP_S``."""
OPTIONAL_KEYS = ("reward", "terminated")
"""Keys that a robot may leave out; checked like the others if they are there."""
LISTED_NAMES = 4
"""Longer lists of names are shortened in messages."""


class ReadingError(BridgeError):
    """A reading that must not be acted on."""


class ReadingChecker:
    """Check readings one after the other, and keep the newest valid one in ``latest``."""

    def __init__(self, needed: Sequence[str]) -> None:
        self._needed = tuple(dict.fromkeys(("stamp", "seq", *needed)))
        self._needed_values = itemgetter(*self._needed)
        self.latest: Reading = {}
        """Newest valid reading; empty before the first one."""
        self.repeated = 0
        """Readings that were not new."""
        self.disordered = 0
        """Among these, readings older than the one before."""
        self._accepted_at = 0.0
        self._clock_offset = 0.0
        self._last_seq_before_reset = math.nan

    def reset(self) -> None:
        """Start afresh after the robot was restarted: its clock may jump, its numbers go on.

        A reading from before the restart may still arrive; it is known by its number.
        """
        self._last_seq_before_reset = self.latest.get("seq", math.nan)
        self.latest = {}

    def accept(self, reading: Reading, now: float) -> bool:
        """Check a reading that was read at ``now``, s; return whether it is new.

        A reading that is not new leaves ``latest`` as it is.

        Raises:
            ReadingError: a key is missing, a number is not finite, or the robot's clock jumped.
        """
        self._check_complete_and_finite(reading)

        if not self.latest:
            # False if either is NaN, that is, if there has been no reading before the reset
            if reading["seq"] <= self._last_seq_before_reset:
                self.repeated += 1
                return False
            self.latest = reading
            self._accepted_at = now
            self._clock_offset = now - reading["stamp"]
            return True

        stamp_step = reading["stamp"] - self.latest["stamp"]
        seq_step = reading["seq"] - self.latest["seq"]

        if stamp_step < -CLOCK_JUMP_S:
            raise ReadingError(f"the robot's clock went back by {-stamp_step:.3g} s")

        # Both must move on: a driver may repeat a message with a new number, or a new stamp
        if stamp_step <= 0 or seq_step <= 0:
            self.repeated += 1
            self.disordered += stamp_step < 0 or seq_step < 0
            return False

        # lag = (now − stamp) − offset: how much older the reading is than the offset explains
        lag = now - reading["stamp"] - self._clock_offset
        if abs(lag) > CLOCK_JUMP_S:
            if lag < 0:
                direction = "ahead of this machine's"
            else:
                direction = "behind, or its readings are delayed"
            raise ReadingError(f"the robot's clock is suddenly {abs(lag):.3g} s {direction}")

        # Let the offset follow slow drift, at CLOCK_DRIFT at most: otherwise it would add up to a
        # "jump" after hours
        drift = CLOCK_DRIFT * (now - self._accepted_at)
        self._clock_offset += min(max(lag, -drift), drift)
        self.latest = reading
        self._accepted_at = now
        return True

    def _check_complete_and_finite(self, reading: Reading) -> None:
        # The sum is finite only if every number is: one test instead of one per number
        try:
            needed = sum(self._needed_values(reading))
            optional = sum([reading.get(key, 0.0) for key in OPTIONAL_KEYS])
            total = needed + optional
        except KeyError:
            missing = [key for key in self._needed if key not in reading]
            raise ReadingError(
                f"the robot's reading lacks {_listed(missing)}; it has {_listed(list(reading))}"
            ) from None
        except TypeError:
            total = math.nan

        if not math.isfinite(total):
            keys = (*self._needed, *OPTIONAL_KEYS)
            bad = [key for key in keys if not _is_finite_number(reading.get(key, 0.0))]
            raise ReadingError(f"the robot's reading of {_listed(bad)} is not finite")


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _listed(names: Sequence[str]) -> str:
    if len(names) <= LISTED_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: LISTED_NAMES - 1])}, … ({len(names)})"
