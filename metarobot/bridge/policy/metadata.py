"""Metadata of an exported policy: ``policy.json``, read and checked before anything else is used.

``metarobot.deploy.onnx_export`` writes the file; docs/robot.md describes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.checked_json import (
    BadValueError,
    canonical_digest,
    check_boolean,
    check_choice,
    check_integer,
    check_list,
    check_name,
    check_names,
    check_number,
    check_numbers,
    check_object,
    check_text,
    parse_json,
    read_regular_file,
    show,
)

FORMAT = 2
"""Format of ``policy.json`` that this package reads. Format 1 had no ``content_sha256``."""
KIND = "metarobot-policy"
"""Value of the key ``kind``."""
MODEL_FILE = "policy.onnx"
METADATA_FILE = "policy.json"
MAX_METADATA_BYTES = 32 << 20
LAYOUTS = ("direct", "legged")
"""Values of ``layout``: how readings become observations."""
ADAPTS = ("acting", "between", "none")
"""Values of ``adapts``: while acting, between episodes, or not at all."""
HASH_KEY = "content_sha256"
"""Key of the SHA-256 of all other keys; as one of them is the model's, it covers the folder."""
KEYS = (
    "format",
    "kind",
    "agent",
    "family",
    "run_path",
    "sha256",
    "control_hz",
    "trial",
    "joint_names",
    "joint_stiffness",
    "joint_damping",
    "default_joint_pos",
    "action_scale",
    "observation_names",
    "command_names",
    "action",
    "limits",
    "layout",
    "reward",
    "adapts",
    "explores",
    "noise",
    "inputs",
    "outputs",
    "context",
)
"""Keys that ``policy.json`` must have, besides ``HASH_KEY``."""
OPTIONAL_KEYS = ("versions", "parity", HASH_KEY)

# Bounds of the values, for any robot; see also bridge.robots.joint_bounds
MIN_CONTROL_HZ = 0.1
MAX_CONTROL_HZ = 10_000.0
MAX_HORIZON = 1_000_000
MAX_EPISODES = 10_000
MAX_ROLLOUTS = 10_000
MAX_EPISODE_NUMBERS = 250_000_000
"""Most numbers of the observations of all rollouts that are adapted to at once."""
MAX_JOINTS = 256
MAX_ACTIONS = 256
MAX_STIFFNESS = 10_000.0
"""N·m/rad."""
MAX_DAMPING = 1_000.0
"""N·m·s/rad."""
MAX_ANGLE = 100.0
"""rad."""
MIN_ACTION_SCALE = 1e-6
MAX_ACTION_SCALE = 100.0
"""rad."""
MIN_LIMIT = 1e-3
"""Lowest limit of a speed, rad/s, or of a torque, N·m."""
MAX_VELOCITY = 1_000.0
"""rad/s."""
MAX_TORQUE = 10_000.0
"""N·m."""
MAX_ACTION = 1e6
"""Largest bound of an action, in the policy's own units."""
MAX_NOISE = 4096
MAX_TENSORS = 64
"""Most inputs, outputs and context tensors."""
MAX_DIMENSIONS = 4
MAX_TENSOR_NUMBERS = 4_000_000
MAX_BEGIN = 1e30
"""Largest number of a context's initial value, within float32's range."""
REWARD_KEYS = (
    "kind",
    "legs",
    "foot_radius",
    "step_height",
    "touch",
    "lowest",
    "upright",
    "weights",
)
REWARD_TERMS = (
    "bounce",
    "wobble",
    "tilt",
    "effort",
    "jerk",
    "slip",
    "pose",
    "limits",
    "track",
    "turn",
    "swing",
)
"""Terms of the reward that ``metarobot.bridge.layouts.legged`` computes."""
REWARD_LEGS = 4
LEG_PARTS = ("hip", "thigh", "calf", "foot")
MAX_LENGTH_M = 10.0
MAX_FORCE_N = 100_000.0
MAX_WEIGHT = 1e6

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
            BridgeError: It cannot be read, is damaged, was changed, is of another format, or has a
                value out of its bounds.
        """
        return cls.parse_file(folder, load_metadata(folder))

    @classmethod
    def parse_file(cls, folder: str | Path, data: Mapping[str, Any]) -> PolicyMetadata:
        """Convert what ``load_metadata`` returned.

        Raises:
            BridgeError: A key is missing or a value is out of its bounds.
        """
        path = Path(folder) / METADATA_FILE
        try:
            meta = cls.parse(data)
        except KeyError as e:
            raise BridgeError(f"{path} lacks {e}: export the policy again") from e
        except ValueError as e:
            raise BridgeError(f"{path} is damaged: {e}") from e

        if contradiction := meta.find_contradiction():
            raise BridgeError(f"{path} contradicts itself: {contradiction}")
        return meta

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> PolicyMetadata:
        """Convert JSON data to typed metadata, each value within its bounds.

        Values are not compared with each other; ``find_contradiction`` does that.

        Raises:
            KeyError: A key is missing.
            ValueError: A value has the wrong type or size, or is out of its bounds.
        """
        for key in KEYS:
            if key not in data:
                raise KeyError(key)
        check_object(data, "policy.json", KEYS, OPTIONAL_KEYS)
        _check_records(data)

        joint_names = check_names(data["joint_names"], "joint_names")
        joints = len(joint_names)
        if joints > MAX_JOINTS:
            raise BadValueError(f"joint_names has {joints} entries, more than {MAX_JOINTS}")

        def per_joint(key: str, low: float, high: float) -> tuple[float, ...]:
            return check_numbers(data[key], key, low, high, length=joints)

        return cls(
            agent=_check_argument(check_name(data["agent"], "agent"), "agent"),
            family=_check_argument(check_name(data["family"], "family"), "family"),
            run_path=_check_argument(check_text(data["run_path"], "run_path"), "run_path"),
            sha256=check_text(data["sha256"], "sha256"),
            control_hz=check_number(
                data["control_hz"], "control_hz", MIN_CONTROL_HZ, MAX_CONTROL_HZ
            ),
            trial=_parse_trial(data["trial"]),
            joint_names=joint_names,
            joint_stiffness=per_joint("joint_stiffness", 0.0, MAX_STIFFNESS),
            joint_damping=per_joint("joint_damping", 0.0, MAX_DAMPING),
            default_joint_pos=per_joint("default_joint_pos", -MAX_ANGLE, MAX_ANGLE),
            action_scale=per_joint("action_scale", MIN_ACTION_SCALE, MAX_ACTION_SCALE),
            observation_names=check_names(data["observation_names"], "observation_names"),
            command_names=check_names(data["command_names"], "command_names"),
            action=_parse_action(data["action"]),
            limits=_parse_limits(data["limits"], joint_names),
            layout=check_choice(data["layout"], "layout", LAYOUTS),
            reward=_parse_reward(data["reward"]),
            adapts=check_choice(data["adapts"], "adapts", ADAPTS),
            explores=check_boolean(data["explores"], "explores"),
            noise=check_integer(data["noise"], "noise", 0, MAX_NOISE),
            inputs=_parse_nodes(data["inputs"], "inputs"),
            outputs=_parse_nodes(data["outputs"], "outputs"),
            context=_parse_context(data["context"]),
        )

    def find_contradiction(self) -> str:
        """Return the first contradiction between the values; empty if there is none."""
        joints = len(self.joint_names)
        actions = len(self.action.names)

        # joints
        for joint, pose in zip(self.joint_names, self.default_joint_pos, strict=True):
            limit = self.limits[joint]
            if not limit.low <= pose <= limit.high:
                return (
                    f"the default pose of {joint}, {pose:g} rad, is outside its range, "
                    f"{limit.low:g} to {limit.high:g}"
                )

        # layout
        if self.layout == "legged" and joints != actions:
            return f"layout 'legged' of {joints} joints and {actions} actions"
        # a "direct" policy commands by name: no name may reach further than its joint
        bounds = zip(self.action.names, self.action.low, self.action.high, strict=True)
        for name, low, high in bounds:
            reached = self.limits.get(name.removesuffix(".pos"))
            if (
                self.layout == "direct"
                and reached
                and not reached.low <= low < high <= reached.high
            ):
                return (
                    f"the action {show(name)} reaches {low:g} to {high:g}, beyond its joint's range"
                )
        if not self.observation_names:
            return "observation_names is empty"
        if unknown := set(self.command_names) - set(self.observation_names):
            return f"command_names has {show(min(unknown))}, which is no observation"

        # model
        expected_outputs: dict[str, Shape] = {"actions": (1, actions)}
        for tensor in self.context:
            if tensor.written is not None:
                expected_outputs[tensor.written] = tensor.shape
        context_names = {tensor.name for tensor in self.context}
        if self.outputs != expected_outputs or len(context_names) < len(self.context):
            return "the outputs are not the action and the context"

        # memory
        trial = self.trial
        numbers = trial.horizon * trial.rollouts * len(self.observation_names)
        if numbers > MAX_EPISODE_NUMBERS:
            return (
                f"{trial.rollouts} rollouts of {trial.horizon} steps hold {numbers:,} numbers, "
                f"more than {MAX_EPISODE_NUMBERS:,}"
            )
        return ""


def load_metadata(folder: str | Path) -> dict[str, Any]:
    """Return the JSON data of a policy folder's ``policy.json``, as it was exported.

    Raises:
        BridgeError: It cannot be read, is not metarobot's, is of another format, or was changed.
    """
    path = Path(folder) / METADATA_FILE
    try:
        data = parse_json(read_regular_file(path, MAX_METADATA_BYTES))
    except OSError as e:
        reason = e.strerror or e
        raise BridgeError(f"{folder} is no policy folder: cannot read {path}: {reason}") from e
    except ValueError as e:
        raise BridgeError(f"{path} is damaged: {e}") from e

    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise BridgeError(
            f"{path} is not metarobot's: it is not of kind {KIND!r}; metarobot export writes it"
        )
    if "format" not in data:
        raise BridgeError(f"{path} lacks 'format': export the policy again")
    try:
        version = check_integer(data["format"], "format", 1, 10**9)
    except ValueError as e:
        raise BridgeError(f"{path} is damaged: {e}") from e
    if version > FORMAT:
        raise BridgeError(
            f"{path} is of format {version}, this metarobot reads format {FORMAT}: upgrade"
        )
    if version < FORMAT:
        raise BridgeError(
            f"{path} is of format {version}, which had no {HASH_KEY}: "
            "export the policy again, with metarobot export"
        )

    try:
        has_right_digest = data.get(HASH_KEY) == content_digest(data)
    except (RecursionError, ValueError):
        has_right_digest = False
    if not has_right_digest:
        raise BridgeError(
            f"{path} was changed or is damaged: its content is not that of {HASH_KEY}; "
            "export the policy again"
        )
    return data


def content_digest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all keys but ``HASH_KEY``."""
    return canonical_digest({key: value for key, value in data.items() if key != HASH_KEY})


def model_properties(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the strings that the ONNX file of a policy holds, of the data of ``policy.json``.

    The two digests are left out: they are computed from the ONNX file.
    """
    return flatten({key: value for key, value in data.items() if key not in ("sha256", HASH_KEY)})


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Flatten metadata to the strings that an ONNX file holds.

    Nested keys are joined by dots (``trial.horizon``), lists become comma-separated values, and a
    list of named objects becomes nested keys (``context.h.begin``).
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        by_name = {}
        for entry in value:
            by_name[entry["name"]] = {k: v for k, v in entry.items() if k != "name"}
        value = by_name
    if isinstance(value, dict):
        flat: dict[str, str] = {}
        for name, child in value.items():
            flat |= flatten(child, f"{key}.{name}" if key else name)
        return flat
    return {key: ",".join(_words(value))}


def _words(value: Any) -> Iterator[str]:
    """Yield the elements of nested lists as text: strings as they are, the rest as JSON."""
    if isinstance(value, list):
        for element in value:
            yield from _words(element)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _check_argument(text: str, place: str) -> str:
    """Return a text that becomes an argument of another process, where it must be no option."""
    if text.startswith("-"):
        raise BadValueError(f"{place} is {show(text)}, which begins as an option does")
    return text


def _check_records(data: Mapping[str, Any]) -> None:
    """Check the keys that nothing is computed from: versions and the parity check's result."""
    versions = data.get("versions", {})
    check_object(versions, "versions", (), tuple(versions) if isinstance(versions, dict) else ())
    for package, version in versions.items():
        check_name(package, "a package of versions")
        check_text(version, f"versions.{package}")
    if "parity" in data:
        keys = ("tolerance", "difference", "steps", "tasks", "seed")
        for key, value in check_object(data["parity"], "parity", keys).items():
            check_number(value, f"parity.{key}", 0.0, 1e18)


def _parse_trial(value: Any) -> TrialMetadata:
    trial = check_object(value, "trial", ("horizon", "episodes"), ("rollouts",))
    return TrialMetadata(
        horizon=check_integer(trial["horizon"], "trial.horizon", 1, MAX_HORIZON),
        episodes=check_integer(trial["episodes"], "trial.episodes", 1, MAX_EPISODES),
        rollouts=check_integer(trial.get("rollouts", 1), "trial.rollouts", 1, MAX_ROLLOUTS),
    )


def _parse_action(value: Any) -> ActionMetadata:
    action = check_object(value, "action", ("names", "low", "high"))
    names = check_names(action["names"], "action.names")
    if not 0 < len(names) <= MAX_ACTIONS:
        raise BadValueError(f"action.names has {len(names)} entries, not 1 to {MAX_ACTIONS}")
    low = check_numbers(action["low"], "action.low", -MAX_ACTION, MAX_ACTION, length=len(names))
    high = check_numbers(action["high"], "action.high", -MAX_ACTION, MAX_ACTION, length=len(names))
    for name, lowest, highest in zip(names, low, high, strict=True):
        if not lowest < highest:
            raise BadValueError(
                f"the action {show(name)} has no room from {lowest:g} to {highest:g}"
            )
    return ActionMetadata(names, low, high)


def _parse_limits(value: Any, joint_names: tuple[str, ...]) -> dict[str, JointLimit]:
    limits = {}
    for joint, entry in check_object(value, "limits", joint_names).items():
        place = f"limits.{joint}"
        check_object(entry, place, ("low", "high", "velocity", "torque"))
        limit = JointLimit(
            low=check_number(entry["low"], f"{place}.low", -MAX_ANGLE, MAX_ANGLE),
            high=check_number(entry["high"], f"{place}.high", -MAX_ANGLE, MAX_ANGLE),
            velocity=check_number(entry["velocity"], f"{place}.velocity", MIN_LIMIT, MAX_VELOCITY),
            torque=check_number(entry["torque"], f"{place}.torque", MIN_LIMIT, MAX_TORQUE),
        )
        if not limit.low < limit.high:
            raise BadValueError(f"{place} leaves no room from {limit.low:g} to {limit.high:g} rad")
        limits[joint] = limit
    return limits


def _parse_reward(value: Any) -> dict[str, Any] | None:
    """Check what a robot needs to compute its reward; ``layouts.legged`` reads it."""
    if value is None:
        return None
    rules = check_object(value, "reward", REWARD_KEYS)
    check_choice(rules["kind"], "reward.kind", ("quadruped",))

    legs = rules["legs"]
    names = check_names(list(legs) if isinstance(legs, dict) else legs, "reward.legs")
    check_object(legs, "reward.legs", names)
    if len(names) != REWARD_LEGS:
        raise BadValueError(f"reward.legs has {len(names)} entries, not {REWARD_LEGS}")
    for leg, parts in legs.items():
        for part, place in check_object(parts, f"reward.legs.{leg}", LEG_PARTS).items():
            where = f"reward.legs.{leg}.{part}"
            check_numbers(place, where, -MAX_LENGTH_M, MAX_LENGTH_M, length=3)

    check_number(rules["foot_radius"], "reward.foot_radius", 0.0, MAX_LENGTH_M)
    # heights are divided by it
    check_number(rules["step_height"], "reward.step_height", 1e-3, MAX_LENGTH_M)
    check_number(rules["touch"], "reward.touch", 0.0, MAX_FORCE_N)
    check_number(rules["lowest"], "reward.lowest", -MAX_LENGTH_M, MAX_LENGTH_M)
    # the cosine of the tilt at which the robot has fallen
    check_number(rules["upright"], "reward.upright", -1.0, 1.0)
    for term, weight in check_object(rules["weights"], "reward.weights", (), REWARD_TERMS).items():
        check_number(weight, f"reward.weights.{term}", -MAX_WEIGHT, MAX_WEIGHT)
    return rules


def _parse_nodes(value: Any, place: str) -> dict[str, Shape]:
    """Return name -> shape of the model's inputs or outputs."""
    entries = check_list(value, place)
    if len(entries) > MAX_TENSORS:
        raise BadValueError(f"{place} has {len(entries)} entries, more than {MAX_TENSORS}")
    shapes: dict[str, Shape] = {}
    for i, entry in enumerate(entries):
        node = check_object(entry, f"{place}[{i}]", ("name", "shape"))
        name = check_name(node["name"], f"{place}[{i}].name")
        if name in shapes:
            raise BadValueError(f"{place} has {show(name)} twice")
        shapes[name] = _parse_shape(node["shape"], f"{place}[{i}].shape")
    return shapes


def _parse_shape(value: Any, place: str) -> Shape:
    entries = check_list(value, place)
    if not 0 < len(entries) <= MAX_DIMENSIONS:
        raise BadValueError(f"{place} has {len(entries)} dimensions, not 1 to {MAX_DIMENSIONS}")
    shape = tuple(check_integer(size, place, 1, MAX_TENSOR_NUMBERS) for size in entries)
    if math.prod(shape) > MAX_TENSOR_NUMBERS:
        raise BadValueError(f"{place} is {list(shape)}, more than {MAX_TENSOR_NUMBERS:,} numbers")
    return shape


def _parse_context(value: Any) -> tuple[ContextTensor, ...]:
    entries = check_list(value, "context")
    if len(entries) > MAX_TENSORS:
        raise BadValueError(f"context has {len(entries)} entries, more than {MAX_TENSORS}")
    tensors = []
    for i, entry in enumerate(entries):
        place = f"context[{i}]"
        check_object(entry, place, ("name", "in", "out", "shape", "begin"))
        read = entry["in"]
        written = entry["out"]
        name = check_name(entry["name"], f"{place}.name")
        shape = _parse_shape(entry["shape"], f"{place}.shape")
        begin = entry["begin"]
        if begin != "zeros":
            _check_nested(begin, f"context {name} begins with", shape)
        tensors.append(
            ContextTensor(
                name=name,
                read=None if read is None else check_name(read, f"{place}.in"),
                written=None if written is None else check_name(written, f"{place}.out"),
                shape=shape,
                begin=begin,
            )
        )
    return tuple(tensors)


def _check_nested(value: Any, place: str, shape: Shape) -> None:
    """Check that nested lists hold finite numbers in the given shape."""
    if not isinstance(value, list) or len(value) != shape[0]:
        raise BadValueError(f"{place} {show(value)} where a list of {shape[0]} belongs")
    for entry in value:
        if len(shape) > 1:
            _check_nested(entry, place, shape[1:])
        elif not isinstance(entry, int | float) or not abs(entry) <= MAX_BEGIN:
            raise BadValueError(f"{place} {show(entry)} where a number belongs")
