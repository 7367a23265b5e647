"""What a run is made of: a policy, how it adapts, settings; and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from metarobot.bridge.policy.metadata import Meta


class Acting(Protocol):
    """What the controller needs of a policy; ``metarobot.bridge.policy.onnx_policy.Policy`` is
    one.
    """

    meta: Meta
    chosen: Any
    """The latest action before it was clipped to its bounds."""

    def begin(self) -> None:
        """Start a trial."""

    def act(self, obs: Any, reward: float, done: bool, noise: Any = None) -> Any:
        """Return the action ``(act,)``, clipped to its bounds."""

    def adopt(self, context: Mapping[str, Any]) -> None:
        """Take over a context."""

    def context(self) -> Mapping[str, Any]:
        """Return the context."""


class Adapting(Protocol):
    """Adaptation between episodes; ``metarobot.bridge.adaptation_client.Adaptation`` is one."""

    rollouts: int
    ready: bool
    busy: bool

    def step(self, obs: Any, action: Any, reward: float) -> None:
        """Write down a step."""

    def end(self, final_obs: Any, *, failed: bool) -> None:
        """End an episode."""

    def drop(self) -> None:
        """Leave out the episode under way."""

    def clear(self) -> None:
        """Forget the episodes collected."""

    def start(self, context: Mapping[str, Any]) -> None:
        """Begin to adapt."""

    def poll(self) -> Any:
        """Return the outcome if there is one by now."""

    def stop(self) -> None:
        """End the process, if there is one."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run goes."""

    hz: float
    """Control rate."""
    seconds: float = math.inf
    """When to stop."""
    trials: int = 0
    """Trials to live; 0: as many as there is time for."""
    episodes: int = 0
    """Episodes a trial; 0: as many as the policy was trained for."""
    ready_s: float = 2.0
    """How long the way to the pose takes that an episode begins with."""
    soft_s: float = 1.0
    """How long the policy's targets are blended in at an episode's start; robots that restart need
    none."""
    rate: float = 2.0
    """How fast a target may move, as a multiple of the joint's speed limit."""
    damp_s: float = 1.0
    """How long damping is sent at the end."""
    seed: int = 0
    """Draws the exploration noise of policies that need it."""


@dataclass
class Report:
    """What came of a run."""

    reason: str = ""
    """Why it ended."""
    fault: bool = False
    """Whether something went wrong, and it was not its time that was over."""
    returns: list[list[float]] = field(default_factory=list)
    """Return of each episode that was lived to its end, a list a trial."""
    adapted: list[str] = field(default_factory=list)
    """What became of each adaptation between episodes."""
    limited: dict[str, dict[str, int]] = field(default_factory=dict)
    """Joint -> kind of limit -> how many commands it moved."""
    pace: dict[str, float] = field(default_factory=dict)
    repeated: int = 0
    disordered: int = 0
    sent: int = 0
    dropped: int = 0
    """Ticks that the log could not keep up with."""
