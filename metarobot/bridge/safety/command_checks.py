"""Command checks: the last validation of a command inside a robot's driver, whoever sent it.

Limits are not applied here (``command_limits`` does that, before the gate). A driver only refuses
what cannot be put on the wire: wrong keys and numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Command

HOLDING_MARGIN_RAD = 0.2
"""How far outside its range a joint may be held: a measured angle has noise and an offset."""


class HasRange(Protocol):
    """Limits of a joint, of which the range matters here."""

    @property
    def low(self) -> float:
        """Lowest angle, rad."""

    @property
    def high(self) -> float:
        """Highest angle, rad."""


def may_be_held(angles: Mapping[str, float], limits: Mapping[str, HasRange]) -> bool:
    """Return whether a robot may be commanded to hold these measured angles, joint -> rad.

    Robots without torque control are damped by a command to stay where they are. An angle that is
    not finite or that no joint can have would be a jerk instead.
    """
    return all(_is_in_range(angle, limits[joint]) for joint, angle in angles.items())


def _is_in_range(angle: float, limit: HasRange) -> bool:
    # False for NaN
    return limit.low - HOLDING_MARGIN_RAD <= angle <= limit.high + HOLDING_MARGIN_RAD


def validated_command(action: Command, keys: Sequence[str]) -> list[float]:
    """Return the numbers of a command in the order of ``keys``.

    Raises:
        BridgeError: a key is missing or superfluous, or a number is not finite. Nothing is sent.
    """
    wrong = sorted(action.keys() ^ set(keys))
    if wrong:
        raise BridgeError(
            f"the command's keys do not match: {', '.join(wrong)}; expected {', '.join(keys)}"
        )

    values = [float(action[key]) for key in keys]
    if not all(map(math.isfinite, values)):
        pairs = zip(keys, values, strict=True)
        bad = {key: value for key, value in pairs if not math.isfinite(value)}
        raise BridgeError(f"the command is not finite and was not sent: {bad}")
    return values
