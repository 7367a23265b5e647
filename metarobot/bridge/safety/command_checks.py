"""Command checks: the last validation of a command inside a robot's driver, whoever sent it.

Limits are not applied here (``command_limits`` does that, before the gate). A driver only refuses
what cannot be put on the wire: wrong keys and numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Command


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
