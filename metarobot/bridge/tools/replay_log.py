"""Replay a log without a robot, to see whether a policy chooses the logged actions again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.tools.log_format import EVENT_TOPIC, POLICY_RECORD
from metarobot.bridge.tools.read_log import GAP, read_log

LONGEST_MESSAGE = 120
"""Characters of a damaged log's problem that are shown."""


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """How the actions of a replay differ from the logged ones."""

    steps: int
    """Number of steps in which the policy acted."""
    difference: float
    """Largest absolute difference of an action's element from the logged one."""
    where: str
    """The element's name, and the trial, episode and step of that difference."""
    differing: int
    """Number of steps with a difference above the tolerance."""
    same: bool
    """Whether the log was made with this very policy."""


def replay(path: Path, policy: OnnxPolicy, tolerance: float = 1e-5) -> ReplayResult:
    """Give the logged observations to a policy, and compare its actions with the logged ones.

    The log may come from a stranger: whatever it holds, the outcome is a result or one line.

    Raises:
        BridgeError: the log is unreadable, damaged, of a policy of another size, or without any
            action.
    """
    result = _Comparison(policy, tolerance)
    for topic, content in read_log(path):
        try:
            result.add(topic, content)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            message = " ".join(str(e).split())[:LONGEST_MESSAGE]
            raise BridgeError(f"{path} holds what no run writes: {topic}: {message}") from e

    if not result.steps:
        raise BridgeError(f"{path} holds no step in which a policy acted")
    return ReplayResult(
        steps=result.steps,
        difference=result.worst,
        where=result.where,
        differing=result.differing,
        same=result.same,
    )


class _Comparison:
    """Compare a policy's actions with those of a log, one entry after the other."""

    def __init__(self, policy: OnnxPolicy, tolerance: float) -> None:
        self.policy = policy
        self.tolerance = tolerance
        self.same = False
        self.steps = 0
        self.differing = 0
        self.worst = 0.0
        self.where = ""
        self._trial: float = -1
        self._skipped_trial: float = -1
        """Trial of which a part is missing, so that the policy's context is not known."""
        self._after_gap = False

    def add(self, topic: str, content: dict[str, Any]) -> None:
        """Take an entry of the log; whatever is wrong with it raises."""
        if topic == POLICY_RECORD:
            self.same = content.get("policy") == self.policy.meta.sha256
        elif topic == GAP:
            self._after_gap = True
        elif topic == EVENT_TOPIC:
            # The policy adapted between two episodes: continue with the same context
            if content["what"] == "adapted" and content["context"]:
                self.policy.set_context(_context(content["context"]))
        elif content["action"][:1] not in ([], [None]):
            # Other ticks have no action: the robot was moved to its pose, or held there
            self._add_step(content)

    def _add_step(self, tick: dict[str, Any]) -> None:
        trial, episode, step = _numbers([tick["trial"], tick["episode"], tick["step"]], "trial")
        if self._after_gap:
            self._skipped_trial = trial
            self._after_gap = False
        if trial == self._skipped_trial:
            return
        if trial != self._trial:
            self._trial = trial
            self.policy.begin()

        difference = self._action_difference(tick)
        self.steps += 1
        self.differing += bool(difference.max() > self.tolerance)
        # Written as "not <=" so that NaN counts as the worst
        if not difference.max() <= self.worst:
            self.worst = float(difference.max())
            element = self.policy.meta.action.names[int(difference.argmax())]
            self.where = f"{element}, trial {trial + 1:g} episode {episode + 1:g} step {step:g}"

    def _action_difference(self, tick: dict[str, Any]) -> NDArray[np.float64]:
        """Act on a logged tick; return the absolute differences from its action, ``(act,)``."""
        policy = self.policy
        sizes = {"obs": len(policy.meta.observation_names), "action": len(policy.meta.action.names)}
        for name, size in sizes.items():
            if len(tick[name]) != size:
                raise BridgeError(
                    f"the log is of another policy: {len(tick[name])} numbers of {name}, not {size}"
                )
        obs = _numbers(tick["obs"], "obs").astype(np.float32)
        logged_action = _numbers(tick["action"], "action")
        noise = None
        if policy.meta.noise:
            noise = _numbers(tick["noise"], "noise").astype(np.float32)
        (reward,) = _numbers([tick["reward"]], "reward")
        policy.act(obs, float(reward), bool(tick["done"]), noise)
        difference: NDArray[np.float64] = np.abs(policy.chosen.astype(np.float64) - logged_action)
        return difference


def _numbers(values: Any, name: str) -> NDArray[np.float64]:
    """Return a list of finite numbers as an array."""
    if not all(isinstance(value, int | float) for value in values):
        raise TypeError(f"{name} is no list of numbers")
    array = np.array(values, np.float64)
    # Beyond float32 the policy would see an infinite number
    if array.ndim != 1 or not np.all(np.abs(array) <= np.finfo(np.float32).max):
        raise ValueError(f"{name} is no list of finite numbers")
    return array


def _context(entries: Any) -> dict[str, NDArray[np.float32]]:
    """Return a logged context, name -> array."""
    if not isinstance(entries, dict):
        raise TypeError("the context is no object")
    return {name: np.array(values, np.float32) for name, values in entries.items()}
