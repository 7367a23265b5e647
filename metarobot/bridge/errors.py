"""What can go wrong between a policy folder and a robot."""

from __future__ import annotations

from metarobot.errors import MetarobotError


class BridgeError(MetarobotError):
    """A policy that does not load or does not fit, or a robot that is not there: one line, and
    nothing is sent.
    """
