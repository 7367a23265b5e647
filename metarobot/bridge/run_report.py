"""Types of a run: the policy it takes, how that adapts, its settings, and its report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from metarobot.bridge.policy.metadata import PolicyMetadata


class RunnablePolicy(Protocol):
    """A policy as the controller uses it: ``OnnxPolicy`` in ``metarobot.bridge.policy``."""

    meta: PolicyMetadata
    chosen: Any
    """The latest action, ``(act,)``, before it was clipped to its bounds."""

    def begin(self) -> None:
        """Start a trial."""

    def act(self, obs: Any, reward: float, done: bool, noise: Any = None) -> Any:
        """Return the action, ``(act,)``, clipped to its bounds."""

    def set_context(self, context: Mapping[str, Any]) -> None:
        """Replace the context, name -> array."""

    def context(self) -> Mapping[str, Any]:
        """Return a copy of the context, name -> array."""


class EpisodeAdaptation(Protocol):
    """Adaptation between episodes: ``metarobot.bridge.adaptation_client.AdaptationClient``."""

    rollouts: int
    """Episodes to collect before each adaptation."""

    @property
    def ready(self) -> bool:
        """Whether enough episodes are collected."""

    @property
    def busy(self) -> bool:
        """Whether an adaptation is going on."""

    def step(self, obs: Any, action: Any, reward: float) -> None:
        """Record a control step."""

    def end(self, final_obs: Any, *, failed: bool) -> None:
        """End an episode."""

    def drop(self) -> None:
        """Discard the episode that is going on."""

    def clear(self) -> None:
        """Discard the episodes collected."""

    def review(self) -> Any:
        """Return an ``AdaptationResult`` with the context to go back to, or None to go on."""

    def start(self, context: Mapping[str, Any]) -> None:
        """Begin to adapt."""

    def poll(self) -> Any:
        """Return the ``AdaptationResult``, or None if there is none yet."""

    def stop(self) -> None:
        """End the process, if there is one."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of the controller; their names and values are written to the log."""

    hz: float
    """Control rate."""
    seconds: float = math.inf
    """Time after which the run ends."""
    trials: int = 0
    """Trials after which the run ends; 0: no limit."""
    episodes: int = 0
    """Episodes per trial; 0: as many as the policy was trained for."""
    ready_s: float = 2.0
    """Duration of the motion to the pose an episode begins with."""
    soft_s: float = 1.0
    """How long the policy's targets are blended in at an episode's start.

    Robots that restart need none: they begin where the policy expects it."""
    rate: float = 2.0
    """Fastest motion of a target, as a multiple of the joint's speed limit."""
    damp_s: float = 1.0
    """How long damping is sent at the end."""
    seed: int = 0
    """Seed of the exploration noise of policies that need it."""
    log_part_mb: float = 64.0
    """Size at which the log's next part begins, MB."""
    log_max_mb: float = 2000.0
    """Size of all parts at which old ones are deleted, MB."""


@dataclass
class RunReport:
    """Outcome of a run; written to the log with these names."""

    reason: str = ""
    """Why it ended."""
    fault: bool = False
    """Whether it ended for a fault, rather than at its end or by an operator."""
    returns: list[list[float]] = field(default_factory=list)
    """Trial -> return of each of its finished episodes."""
    adapted: list[str] = field(default_factory=list)
    """A line on each adaptation between episodes."""
    limited: dict[str, dict[str, int]] = field(default_factory=dict)
    """Joint -> kind of limit -> number of commands it moved."""
    pace: dict[str, float] = field(default_factory=dict)
    """Timing of the loop (``LoopTimer.report``)."""
    repeated: int = 0
    """Readings that were not new."""
    disordered: int = 0
    """Among these, readings older than the one before."""
    sent: int = 0
    """Commands sent."""
    dropped: int = 0
    """Ticks and events missing in the log, as its writer could not keep up."""
    log_failure: str = ""
    """Why the log is not complete, if it is not."""
