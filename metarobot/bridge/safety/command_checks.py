"""The last look at a command before it leaves, whoever it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robot_interface import Command


def checked(action: Command, keys: Sequence[str]) -> list[float]:
    """Return a command's numbers in the order of ``keys``; raise ``BridgeError`` for other keys and
    for no number.
    """
    if wrong := sorted(action.keys() ^ set(keys)):
        raise BridgeError(
            f"a command that lacks or should lack {', '.join(wrong)}; it is of {', '.join(keys)}"
        )
    values = [float(action[key]) for key in keys]
    if not all(map(math.isfinite, values)):
        bad = {
            key: value for key, value in zip(keys, values, strict=True) if not math.isfinite(value)
        }
        raise BridgeError(f"a command that is not finite, and is not sent: {bad}")
    return values
