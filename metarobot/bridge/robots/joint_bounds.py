"""What a robot's joints may be asked for at most, whatever a policy folder says.

``policy.json`` comes with the policy, perhaps from a stranger. The bounds here belong to the
robot's driver: a policy whose gains, limits or default pose exceed them is refused before anything
is sent. A driver that knows its robot has ``joint_bounds``; all others have ``DEFAULT_BOUNDS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import PolicyMetadata

ROUNDING = 1e-4
"""How far a policy's limits may exceed the bounds; models are rounded."""


@dataclass(frozen=True)
class JointBounds:
    """Bounds of what a policy may ask of one joint."""

    low: float
    """Lowest angle, rad."""
    high: float
    """Highest angle, rad."""
    velocity: float
    """Highest limit of the speed, rad/s."""
    torque: float
    """Highest limit of the torque, N·m."""
    stiffness: float
    """Highest proportional gain, N·m/rad."""
    damping: float
    """Highest derivative gain, N·m·s/rad."""


DEFAULT_BOUNDS = JointBounds(
    low=-12.6, high=12.6, velocity=50.0, torque=500.0, stiffness=2000.0, damping=200.0
)
"""Bounds of a joint of an unknown robot: two turns either way, and the strongest drives in use."""


@runtime_checkable
class HasJointBounds(Protocol):
    """A driver's class that knows what its robot's joints stand."""

    joint_bounds: Mapping[str, JointBounds]
    """Joint -> its bounds."""


def check_joint_bounds(robot: str, bounds: Mapping[str, JointBounds], meta: PolicyMetadata) -> None:
    """Check that a policy asks no more of a robot's joints than they may be asked for.

    Args:
        robot: The robot's name, for the message.
        bounds: Joint -> its bounds; joints that are not there have ``DEFAULT_BOUNDS``.
        meta: The policy's metadata.

    Raises:
        BridgeError: It asks for more; the message names joint, value and bound.
    """
    for i, joint in enumerate(meta.joint_names):
        bound = bounds.get(joint, DEFAULT_BOUNDS)
        limit = meta.limits[joint]
        for what, value, low, high in (
            ("a lowest angle", limit.low, bound.low, bound.high),
            ("a highest angle", limit.high, bound.low, bound.high),
            ("a default pose", meta.default_joint_pos[i], bound.low, bound.high),
            ("a speed limit", limit.velocity, 0.0, bound.velocity),
            ("a torque limit", limit.torque, 0.0, bound.torque),
            ("a stiffness", meta.joint_stiffness[i], 0.0, bound.stiffness),
            ("a damping", meta.joint_damping[i], 0.0, bound.damping),
        ):
            # written as "not" so that NaN is refused
            if not low - ROUNDING <= value <= high + ROUNDING:
                raise BridgeError(
                    f"the policy asks for {what} of {value:g} at {joint}; "
                    f"robot {robot} allows {low:g} to {high:g}"
                )
