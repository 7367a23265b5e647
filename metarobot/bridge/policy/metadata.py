"""What a policy folder says of itself: ``policy.json``, read and checked before anything else is
believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarobot.bridge.errors import BridgeError

FORMAT, KIND = 1, "metarobot-policy"
MODEL, ABOUT = "policy.onnx", "policy.json"
LAYOUTS = ("direct", "legged")
ADAPTS = ("acting", "between", "none")
WORDS = ("agent", "family", "run_path", "sha256", "layout", "adapts")
PER_JOINT = ("joint_stiffness", "joint_damping", "default_joint_pos", "action_scale", "limits")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """What the agent takes for one situation: so many episodes of so many control steps at most."""

    horizon: int
    episodes: int
    rollouts: int = 1
    """Episodes that an agent which adapts between them takes as one: what it learns from at
    once."""


@dataclass(frozen=True)
class Action:
    """The elements of the action and their bounds, in the policy's own units."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Limit:
    """What one joint can do: angles rad, speed rad/s, torque N·m."""

    low: float
    high: float
    velocity: float
    torque: float


@dataclass(frozen=True)
class Part:
    """One tensor of the context."""

    name: str
    read: str | None
    """The model's input; None where acting does not read it."""
    written: str | None
    """The model's output; None where acting leaves it as it is."""
    shape: Shape
    begin: Any
    """What a trial begins with: ``"zeros"``, or numbers in nested lists of that shape."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """All that ``policy.json`` says; names as there."""

    agent: str
    family: str
    run_path: str
    sha256: str
    control_hz: float
    trial: Trial
    joint_names: tuple[str, ...]
    joint_stiffness: tuple[float, ...]
    """N·m/rad."""
    joint_damping: tuple[float, ...]
    """N·m·s/rad."""
    default_joint_pos: tuple[float, ...]
    """rad."""
    action_scale: tuple[float, ...]
    """How far an action of 1 moves a joint's target from its default, rad."""
    observation_names: tuple[str, ...]
    command_names: tuple[str, ...]
    """The observations that an operator sets."""
    action: Action
    limits: Mapping[str, Limit]
    layout: str
    reward: Mapping[str, Any] | None
    adapts: str
    explores: bool
    noise: int
    """How many standard normal numbers a step takes; 0 for agents that do not explore."""
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    context: tuple[Part, ...]

    @classmethod
    def load(cls, folder: str | Path) -> Meta:
        """Read a policy folder's JSON, or say in one line why not."""
        path = Path(folder) / ABOUT
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise BridgeError(
                f"{folder} is no policy folder: cannot read {path}: {e.strerror or e}"
            ) from e
        except ValueError as e:
            raise BridgeError(f"{path} is damaged: {e}") from e
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise BridgeError(
                f"{path} is not metarobot's: it is not of kind {KIND!r}; metarobot export writes it"
            )
        try:
            if data["format"] > FORMAT:
                raise BridgeError(
                    f"{path} is of format {data['format']}, this metarobot reads up to {FORMAT}: upgrade"
                )
            meta = cls.parse(data)
        except KeyError as e:
            raise BridgeError(f"{path} lacks {e}: export the policy again") from e
        except (TypeError, ValueError, AttributeError) as e:
            raise BridgeError(f"{path} is damaged: {e}") from e
        if wrong := meta.inconsistency():
            raise BridgeError(f"{path} contradicts itself: {wrong}")
        return meta

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Meta:
        """Give the JSON its types; raise what comes of wrong ones."""
        action = data["action"]
        simple: dict[str, Any] = {k: str(data[k]) for k in WORDS}
        simple |= {
            k: _tuple(data[k], str) for k in ("joint_names", "observation_names", "command_names")
        }
        simple |= {k: _tuple(data[k], float) for k in PER_JOINT[:-1]}
        return cls(
            **simple,
            control_hz=float(data["control_hz"]),
            trial=Trial(**{k: int(v) for k, v in data["trial"].items()}),
            action=Action(
                _tuple(action["names"], str), *(_tuple(action[k], float) for k in ("low", "high"))
            ),
            limits={
                k: Limit(**{n: float(x) for n, x in v.items()}) for k, v in data["limits"].items()
            },
            reward=data["reward"],
            explores=bool(data["explores"]),
            noise=int(data["noise"]),
            inputs=_shapes(data["inputs"]),
            outputs=_shapes(data["outputs"]),
            context=tuple(
                Part(c["name"], c["in"], c["out"], _tuple(c["shape"], int), c["begin"])
                for c in data["context"]
            ),
        )

    def inconsistency(self) -> str:
        """Say what does not go together; nothing if all does."""
        joints, low, high = len(self.joint_names), self.action.low, self.action.high
        for name in PER_JOINT:
            if len(getattr(self, name)) != joints:
                return f"{joints} joint_names, but {len(getattr(self, name))} {name}"
        if set(self.limits) != set(self.joint_names):
            return f"limits are of {', '.join(self.limits)}, joint_names are {', '.join(self.joint_names)}"
        if not len(self.action.names) == len(low) == len(high) > 0 or not all(
            map(_below, low, high)
        ):
            return "the action's names and bounds do not pair up"
        if self.layout not in LAYOUTS or (self.layout == "legged" and joints != len(low)):
            return f"layout {self.layout!r} of {joints} joints and {len(low)} actions; layouts: {', '.join(LAYOUTS)}"
        written = {p.written: p.shape for p in self.context if p.written is not None}
        if self.outputs != {"actions": (1, len(low))} | written or len(
            {p.name for p in self.context}
        ) < len(self.context):
            return "the outputs are not the action and the context"
        if self.adapts not in ADAPTS:
            return f"adapts is {self.adapts!r}; it may be: {', '.join(ADAPTS)}"
        if not (0 < self.control_hz < math.inf and min(vars(self.trial).values()) > 0):
            return "control_hz, horizon, episodes and rollouts must be positive"
        gains = (
            *self.joint_stiffness,
            *self.joint_damping,
            *self.default_joint_pos,
            *self.action_scale,
        )
        if not all(map(math.isfinite, gains)):
            return "gains, default pose or action scale are not finite"
        unsafe = [
            k
            for k, v in self.limits.items()
            if not (_below(v.low, v.high) and v.velocity > 0 and v.torque > 0)
        ]
        return f"limits of {unsafe[0]} leave it no room" if unsafe else ""


def _tuple(values: Any, kind: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(kind(v) for v in values)


def _shapes(entries: Any) -> dict[str, Shape]:
    return {str(e["name"]): _tuple(e["shape"], int) for e in entries}


def _below(low: float, high: float) -> bool:
    return math.isfinite(low) and math.isfinite(high) and low < high
