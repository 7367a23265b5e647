"""Replay a log without a robot, to see whether a policy chooses the logged actions again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.tools.run_log import EVENT_TOPIC, POLICY_RECORD, read_log


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

    Raises:
        BridgeError: the log is unreadable, of a policy of another size, or without any action.
    """
    same = False
    steps = 0
    differing = 0
    worst = 0.0
    where = ""
    trial = -1

    for topic, content in read_log(path):
        if topic == POLICY_RECORD:
            same = content["policy"] == policy.meta.sha256
            continue

        if topic == EVENT_TOPIC:
            # The policy adapted between two episodes: continue with the same context
            if content["what"] == "adapted" and content["context"]:
                context = {name: _float32(array) for name, array in content["context"].items()}
                policy.set_context(context)
            continue

        # Ticks without an action: the robot was moved to its pose, or held there
        if content["action"][:1] in ([], [None]):
            continue

        if content["trial"] != trial:
            trial = content["trial"]
            policy.begin()
        difference = _action_difference(policy, content)
        steps += 1
        differing += bool(difference.max() > tolerance)
        # Written as "not <=" so that NaN counts as the worst
        if not difference.max() <= worst:
            worst = float(difference.max())
            element = policy.meta.action.names[int(difference.argmax())]
            where = (
                f"{element}, trial {trial + 1:g} episode {content['episode'] + 1:g} "
                f"step {content['step']:g}"
            )

    if not steps:
        raise BridgeError(f"{path} holds no step in which a policy acted")
    return ReplayResult(steps=steps, difference=worst, where=where, differing=differing, same=same)


def _action_difference(policy: OnnxPolicy, tick: dict[str, Any]) -> NDArray[np.float64]:
    """Act on a logged tick; return the absolute differences from the logged action, ``(act,)``."""
    sizes = {"obs": len(policy.meta.observation_names), "action": len(policy.meta.action.names)}
    for name, size in sizes.items():
        if len(tick[name]) != size:
            raise BridgeError(
                f"the log is of another policy: {len(tick[name])} numbers of {name}, not {size}"
            )
    noise = _float32(tick["noise"]) if policy.meta.noise else None
    policy.act(_float32(tick["obs"]), tick["reward"], bool(tick["done"]), noise)
    difference: NDArray[np.float64] = np.abs(
        policy.chosen.astype(np.float64) - np.array(tick["action"])
    )
    return difference


def _float32(values: Sequence[float | None]) -> NDArray[np.float32]:
    return np.array(values, np.float32)
