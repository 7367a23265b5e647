"""What can go wrong between a policy folder and a robot."""

from __future__ import annotations

from metarobot.errors import MetarobotError


class BridgeError(MetarobotError):
    """A policy or robot that cannot be used, or a run that must end; the message is one line.

    Raised before the first command, nothing is sent. Raised later, the robot is damped.
    """


class OperatorStopError(BridgeError):
    """Somebody stops the run by the robot's own means, such as its remote: no fault."""
