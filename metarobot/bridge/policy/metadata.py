"""Metadata of an exported policy: ``policy.json``, read and checked before anything else is used.

``metarobot.deploy.onnx_export`` writes the file; docs/robot.md describes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarobot.bridge.errors import BridgeError

FORMAT = 1
"""Newest format of ``policy.json`` that this package reads."""
KIND = "metarobot-policy"
"""Value of the key ``kind``."""
MODEL_FILE = "policy.onnx"
METADATA_FILE = "policy.json"
LAYOUTS = ("direct", "legged")
"""Values of ``layout``: how readings become observations."""
ADAPTS = ("acting", "between", "none")
"""Values of ``adapts``: while acting, between episodes, or not at all."""
TEXT_KEYS = ("agent", "family", "run_path", "sha256", "layout", "adapts")
NAME_LIST_KEYS = ("joint_names", "observation_names", "command_names")
JOINT_NUMBER_KEYS = ("joint_stiffness", "joint_damping", "default_joint_pos", "action_scale")
"""Keys that hold one number a joint."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TrialMetadata:
    """What a trial is to the agent: its episodes of one task."""

    horizon: int
    """Control steps an episode lasts at most."""
    episodes: int
    """Episodes a trial."""
    rollouts: int = 1
    """Rollouts of one task that an agent which adapts between episodes adapts to at once."""


@dataclass(frozen=True)
class ActionMetadata:
    """Names of the action's elements and their bounds, in the policy's own units."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class JointLimit:
    """Limits of one joint."""

    low: float
    """Lowest angle, rad."""
    high: float
    """Highest angle, rad."""
    velocity: float
    """Highest speed, rad/s."""
    torque: float
    """Highest torque, N·m."""


@dataclass(frozen=True)
class ContextTensor:
    """One tensor of the agent's context."""

    name: str
    read: str | None
    """Its model input, None if acting does not read it; ``in`` in ``policy.json``."""
    written: str | None
    """Its model output, None if acting leaves it unchanged; ``out`` in ``policy.json``."""
    shape: Shape
    begin: Any
    """Its value at a trial's start: ``"zeros"``, or numbers in nested lists of that shape."""


@dataclass(frozen=True, kw_only=True)
class PolicyMetadata:
    """The content of ``policy.json``; fields have the names of its keys.

    Values of joints are in the order of ``joint_names``, and empty for a robot without declared
    hardware.
    """

    agent: str
    """Name of the algorithm."""
    family: str
    """Name of the task family."""
    run_path: str
    """Run folder that the policy was exported from."""
    sha256: str
    """Digest of the model file."""
    control_hz: float
    trial: TrialMetadata
    joint_names: tuple[str, ...]
    joint_stiffness: tuple[float, ...]
    """Proportional gains of the drives, N·m/rad."""
    joint_damping: tuple[float, ...]
    """Derivative gains of the drives, N·m·s/rad."""
    default_joint_pos: tuple[float, ...]
    """Joint targets of an action of zeros, rad."""
    action_scale: tuple[float, ...]
    """How far an action of 1 moves a joint's target from its default, rad."""
    observation_names: tuple[str, ...]
    command_names: tuple[str, ...]
    """Observations that an operator sets."""
    action: ActionMetadata
    limits: Mapping[str, JointLimit]
    """Joint -> its limits."""
    layout: str
    """How readings become observations: one of ``LAYOUTS``."""
    reward: Mapping[str, Any] | None
    """What a robot needs to compute its reward itself; None if it cannot."""
    adapts: str
    """When the agent adapts: one of ``ADAPTS``."""
    explores: bool
    """Whether the agent needs exploration noise to adapt."""
    noise: int
    """Standard normal numbers that a step takes; 0 for agents that do not explore."""
    inputs: Mapping[str, Shape]
    """Model input -> its shape."""
    outputs: Mapping[str, Shape]
    """Model output -> its shape."""
    context: tuple[ContextTensor, ...]

    @classmethod
    def load(cls, folder: str | Path) -> PolicyMetadata:
        """Read and check the metadata of a policy folder.

        Raises:
            BridgeError: It cannot be read, is damaged or newer than this package, or contradicts
                itself.
        """
        path = Path(folder) / METADATA_FILE
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
                    f"{path} is of format {data['format']}, "
                    f"this metarobot reads up to {FORMAT}: upgrade"
                )
            meta = cls.parse(data)
        except KeyError as e:
            raise BridgeError(f"{path} lacks {e}: export the policy again") from e
        except (TypeError, ValueError, AttributeError) as e:
            raise BridgeError(f"{path} is damaged: {e}") from e

        if contradiction := meta.find_contradiction():
            raise BridgeError(f"{path} contradicts itself: {contradiction}")
        return meta

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> PolicyMetadata:
        """Convert JSON data to typed metadata, without checking its consistency.

        Raises:
            KeyError: A key is missing.
            TypeError, ValueError, AttributeError: A value has the wrong type.
        """
        texts: dict[str, Any] = {key: str(data[key]) for key in TEXT_KEYS}
        names: dict[str, Any] = {key: _tuple_of(str, data[key]) for key in NAME_LIST_KEYS}
        numbers: dict[str, Any] = {key: _tuple_of(float, data[key]) for key in JOINT_NUMBER_KEYS}

        trial = TrialMetadata(**{key: int(value) for key, value in data["trial"].items()})
        action = ActionMetadata(
            names=_tuple_of(str, data["action"]["names"]),
            low=_tuple_of(float, data["action"]["low"]),
            high=_tuple_of(float, data["action"]["high"]),
        )
        limits = {}
        for joint, entry in data["limits"].items():
            limits[joint] = JointLimit(**{key: float(value) for key, value in entry.items()})
        context = tuple(
            ContextTensor(
                name=entry["name"],
                read=entry["in"],
                written=entry["out"],
                shape=_tuple_of(int, entry["shape"]),
                begin=entry["begin"],
            )
            for entry in data["context"]
        )
        return cls(
            **texts,
            **names,
            **numbers,
            control_hz=float(data["control_hz"]),
            trial=trial,
            action=action,
            limits=limits,
            reward=data["reward"],
            explores=bool(data["explores"]),
            noise=int(data["noise"]),
            inputs=_shapes(data["inputs"]),
            outputs=_shapes(data["outputs"]),
            context=context,
        )

    def find_contradiction(self) -> str:
        """Return the first contradiction between the values; empty if there is none."""
        joints = len(self.joint_names)
        actions = len(self.action.names)

        # joints
        per_joint = {
            "joint_stiffness": self.joint_stiffness,
            "joint_damping": self.joint_damping,
            "default_joint_pos": self.default_joint_pos,
            "action_scale": self.action_scale,
            "limits": self.limits,
        }
        for name, values in per_joint.items():
            if len(values) != joints:
                return f"{joints} joint_names, but {len(values)} {name}"
        if set(self.limits) != set(self.joint_names):
            limited = ", ".join(self.limits)
            return f"limits are of {limited}, joint_names are {', '.join(self.joint_names)}"

        # action
        low = self.action.low
        high = self.action.high
        paired = actions == len(low) == len(high) > 0
        if not paired or not all(map(_is_interval, low, high)):
            return "the action's names and bounds do not pair up"

        # layout
        if self.layout not in LAYOUTS or (self.layout == "legged" and joints != actions):
            return (
                f"layout {self.layout!r} of {joints} joints and {actions} actions; "
                f"layouts: {', '.join(LAYOUTS)}"
            )

        # model
        expected_outputs: dict[str, Shape] = {"actions": (1, actions)}
        for tensor in self.context:
            if tensor.written is not None:
                expected_outputs[tensor.written] = tensor.shape
        context_names = {tensor.name for tensor in self.context}
        if self.outputs != expected_outputs or len(context_names) < len(self.context):
            return "the outputs are not the action and the context"
        if self.adapts not in ADAPTS:
            return f"adapts is {self.adapts!r}; it may be: {', '.join(ADAPTS)}"

        # numbers
        if not (0 < self.control_hz < math.inf and min(vars(self.trial).values()) > 0):
            return "control_hz, horizon, episodes and rollouts must be positive"
        for values in (
            self.joint_stiffness,
            self.joint_damping,
            self.default_joint_pos,
            self.action_scale,
        ):
            if not all(map(math.isfinite, values)):
                return "gains, default pose or action scale are not finite"
        for joint, limit in self.limits.items():
            has_range = _is_interval(limit.low, limit.high)
            if not (has_range and limit.velocity > 0 and limit.torque > 0):
                return f"limits of {joint} leave it no room"
        return ""


def _tuple_of(convert: Callable[[Any], Any], values: Any) -> tuple[Any, ...]:
    """Convert the elements of a JSON list; raise ``TypeError`` for anything else."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(convert(value) for value in values)


def _shapes(entries: Any) -> dict[str, Shape]:
    return {str(entry["name"]): _tuple_of(int, entry["shape"]) for entry in entries}


def _is_interval(low: float, high: float) -> bool:
    return math.isfinite(low) and math.isfinite(high) and low < high
