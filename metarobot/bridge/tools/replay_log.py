"""A log run through a policy again, without a robot, to see whether it chooses what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.onnx_policy import Policy
from metarobot.bridge.tools import run_log as log


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of it."""

    steps: int
    """Steps in which the policy acted."""
    difference: float
    """The largest difference of an action from the logged one."""
    where: str
    """The action's name, and the trial, episode and step where that was."""
    differing: int
    """Steps with a difference above the tolerance."""
    same: bool
    """Whether the log was made with this very policy."""


def replay(path: Path, policy: Policy, tolerance: float = 1e-5) -> Replay:
    """Act on what a log says was seen, and compare what is chosen with what was chosen then."""
    meta, same = policy.meta, False
    steps = differing = 0
    worst, where, trial = 0.0, "", -1
    for topic, content in log.read(path):
        if topic == log.POLICY:
            same = content["policy"] == meta.sha256
        elif topic == log.EVENT:
            if content["what"] == "adapted" and content["context"]:
                policy.adopt(
                    {
                        name: np.array(array, np.float32)
                        for name, array in content["context"].items()
                    }
                )
        elif content["action"][:1] not in ([], [None]):
            if content["trial"] != trial:
                trial = content["trial"]
                policy.begin()
            difference = _difference(policy, content)
            steps, differing = steps + 1, differing + bool(difference.max() > tolerance)
            if not difference.max() <= worst:
                worst = float(difference.max())
                name = meta.action.names[int(difference.argmax())]
                where = f"{name}, trial {trial + 1:g} episode {content['episode'] + 1:g} step {content['step']:g}"
    if not steps:
        raise BridgeError(f"{path} holds no step in which a policy acted")
    return Replay(steps=steps, difference=worst, where=where, differing=differing, same=same)


def _difference(policy: Policy, tick: dict[str, Any]) -> Any:
    meta = policy.meta
    for name, wanted in (("obs", len(meta.observation_names)), ("action", len(meta.action.names))):
        if len(tick[name]) != wanted:
            raise BridgeError(
                f"the log is of another policy: {len(tick[name])} numbers of {name}, not {wanted}"
            )
    noise = _array(tick["noise"]) if meta.noise else None
    policy.act(_array(tick["obs"]), tick["reward"], bool(tick["done"]), noise)
    return np.abs(policy.chosen.astype(np.float64) - np.array(tick["action"]))


def _array(values: Sequence[float | None]) -> Any:
    return np.array(values, np.float32)
