"""Robots whose readings are observations by name, as simulated ones can be: nothing to reckon."""

from __future__ import annotations

from typing import Any

import numpy as np

from metarobot.bridge.policy.metadata import Meta
from metarobot.bridge.robot_interface import Reading


class Direct:
    """The layout of policies whose robot tells observations, reward and failure itself.

    A robot that tells no reward earns 0 in every step, and an agent that learns from it learns
    nothing.
    """

    def __init__(self, meta: Meta) -> None:
        self._observations, self._actions = meta.observation_names, meta.action.names

    def needed(self) -> tuple[str, ...]:
        """Name the keys that a reading must have."""
        return ("stamp", "seq", *self._observations)

    def begin(self) -> None:
        """Keep nothing of an episode."""

    def observe(self, reading: Reading, last_action: Any) -> Any:
        """Return the observations, float32."""
        return np.fromiter(
            map(reading.__getitem__, self._observations), np.float32, len(self._observations)
        )

    def targets(self, action: Any) -> dict[str, float]:
        """Return the action's elements by name."""
        return dict(zip(self._actions, np.asarray(action, np.float64).tolist(), strict=True))

    def reward(self, before: Reading, after: Reading, action: Any, last_action: Any) -> float:
        """Return what the robot says the action earned."""
        return float(after.get("reward", 0.0))

    def ended(self, reading: Reading) -> bool:
        """Say whether the robot says that the episode has failed."""
        return reading.get("terminated", 0.0) > 0.5
