"""What is believed of a robot's readings: complete, finite, newer than the last, and on a clock
that does not jump.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Reading

JUMP = 0.2
"""The robot's clock may be ahead of ours or behind by so much more than at first, s."""
DRIFT = 1e-3
"""How much of that is taken for clocks of unequal speed, s/s: more than crystals differ."""
TOLD = ("reward", "terminated")
"""Keys that not every robot has."""


class ReadingError(BridgeError):
    """A reading that nothing may be built on."""


class Readings:
    """Checks readings one after the other and keeps the newest sound one."""

    def __init__(self, needed: Sequence[str]) -> None:
        self._needed = tuple(dict.fromkeys(("stamp", "seq", *needed)))
        self._values = itemgetter(*self._needed)
        self.latest: Reading = {}
        self.repeated = self.disordered = 0
        """Readings that were not new, and among them those that were older than the one before."""
        self._heard = self._offset = 0.0
        self._gone = math.nan

    def forget(self) -> None:
        """Begin anew, as after the robot was restarted: the next one has none before it, but a
        higher number.
        """
        self._gone = self.latest.get("seq", math.nan)
        self.latest = {}

    def take(self, reading: Reading, now: float) -> bool:
        """Take in what the robot said; return whether it is new. What is older than the latest is
        not believed.

        Raises ``ReadingError`` for what is missing or not finite, and for a clock that jumped.
        """
        self._complete(reading)
        if not self.latest:
            if reading["seq"] <= self._gone:
                self.repeated += 1
                return False
            self.latest, self._heard, self._offset = reading, now, now - reading["stamp"]
            return True
        ahead, further = (
            reading["stamp"] - self.latest["stamp"],
            reading["seq"] - self.latest["seq"],
        )
        if ahead < -JUMP:
            raise ReadingError(f"the robot's clock went back by {-ahead:.3g} s")
        if ahead <= 0 or further <= 0:
            self.repeated += 1
            self.disordered += ahead < 0 or further < 0
            return False
        behind, drift = now - reading["stamp"] - self._offset, DRIFT * (now - self._heard)
        if abs(behind) > JUMP:
            how = (
                "ahead of this machine's"
                if behind < 0
                else "behind, or its readings are on their way for long"
            )
            raise ReadingError(f"the robot's clock is suddenly {abs(behind):.3g} s {how}")
        self._offset += min(max(behind, -drift), drift)
        self.latest, self._heard = reading, now
        return True

    def _complete(self, reading: Reading) -> None:
        """Raise unless all that is needed is there, and all numbers are finite."""
        try:
            total = sum(self._values(reading)) + sum([reading.get(key, 0.0) for key in TOLD])
        except KeyError:
            missing = [key for key in self._needed if key not in reading]
            raise ReadingError(
                f"the robot's reading lacks {_few(missing)}; it has {_few(list(reading))}"
            ) from None
        except TypeError:
            total = math.nan
        if not math.isfinite(total):
            odd = [key for key in (*self._needed, *TOLD) if not _number(reading.get(key, 0.0))]
            raise ReadingError(f"the robot's reading of {_few(odd)} is not finite")


def _number(x: object) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, … ({len(names)})"
