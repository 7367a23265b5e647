"""The layout ``direct``: a robot whose readings are its observations by name, as a simulated one.

Nothing is computed here: the robot also gives the reward and says when an episode has failed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robot_interface import Reading


class NamedSignalsLayout:
    """Signals of robots that publish observations, reward and failure themselves.

    A robot that publishes no reward earns 0 in every step: an agent that adapts to its reward then
    has nothing to adapt to.
    """

    def __init__(self, meta: PolicyMetadata) -> None:
        self._observation_names = meta.observation_names
        self._action_names = meta.action.names

    def needed(self) -> tuple[str, ...]:
        """Return the keys that a reading must have."""
        return ("stamp", "seq", *self._observation_names)

    def begin(self) -> None:
        """Begin an episode: this layout keeps nothing."""

    def observe(self, reading: Reading, last_action: Any) -> Any:
        """Return the observation ``(obs,)``, float32."""
        values = [reading[name] for name in self._observation_names]
        return np.array(values, np.float32)

    def targets(self, action: Any) -> dict[str, float]:
        """Return the elements of an action by name."""
        values = np.asarray(action, np.float64).tolist()
        return dict(zip(self._action_names, values, strict=True))

    def reward(self, before: Reading, after: Reading, action: Any, last_action: Any) -> float:
        """Return the reward that the robot gives; 0 if it gives none."""
        return float(after.get("reward", 0.0))

    def ended(self, reading: Reading) -> bool:
        """Return whether the robot says that the episode has failed."""
        return reading.get("terminated", 0.0) > 0.5
