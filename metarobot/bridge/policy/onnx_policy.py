"""Run an exported policy with onnxruntime on one thread.

The policy keeps the agent's context between steps: it gives the model's context outputs back as
inputs. ``metarobot.deploy.onnx_export`` writes policy folders and documents the model's inputs.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.checked_json import read_regular_file, show
from metarobot.bridge.policy.metadata import (
    METADATA_FILE,
    MODEL_FILE,
    ContextTensor,
    PolicyMetadata,
    Shape,
    load_metadata,
    model_properties,
)
from metarobot.bridge.policy.onnx_file_check import MAX_MODEL_BYTES, check_onnx_file
from metarobot.bridge.robot_interface import Float32Array
from metarobot.bridge.tools.python_command import child_environment, python_script

try:
    from metarobot.bridge.policy import trial_step
except ImportError as e:
    raise BridgeError("a policy needs onnxruntime: pip install onnxruntime") from e

TRIAL_LIMIT_S = 30.0
"""Longest time for starting a process, loading the model in it, and running a first step, s."""


class OnnxPolicy:
    """An exported policy: ``begin`` a trial, ``act`` in each step, ``set_context`` after adapting.

    Inputs and outputs are buffers that are bound to the model once, so a step allocates little. A
    step that fails leaves the context as it was.

    Args:
        meta: The policy's metadata.
        model: The bytes of the ONNX file.

    Raises:
        BridgeError: The model cannot be read, or does not fit the metadata.
    """

    def __init__(self, meta: PolicyMetadata, model: bytes) -> None:
        self.meta = meta
        self._initial_context = {tensor.name: _initial_value(tensor) for tensor in meta.context}
        self._context = {name: value.copy() for name, value in self._initial_context.items()}

        self._session = _make_session(model)
        _check_nodes("inputs", self._session.get_inputs(), meta.inputs)
        _check_nodes("outputs", self._session.get_outputs(), meta.outputs)

        # one buffer for each possible input; the model has those that the agent reads
        widths = {
            "obs": len(meta.observation_names),
            "action_in": len(meta.action.names),
            "noise_in": meta.noise,
            "reward_in": 1,
            "done_in": 1,
            "first_in": 1,
        }
        percept = {name: np.zeros((1, width), np.float32) for name, width in widths.items()}
        inputs = dict(percept)
        for tensor in meta.context:
            if tensor.read is not None:
                inputs[tensor.read] = self._context[tensor.name]
        outputs = {name: np.zeros(shape, np.float32) for name, shape in meta.outputs.items()}

        self._binding = self._session.io_binding()
        for name, shape in meta.inputs.items():
            _bind(self._binding.bind_input, name, inputs.get(name), shape)
        for name, shape in meta.outputs.items():
            _bind(self._binding.bind_output, name, outputs[name], shape)

        # views of the buffers, as they are used at each step
        self._inputs = {name: buffer[0] for name, buffer in percept.items()}
        self._flat_outputs = [buffer.ravel() for buffer in outputs.values()]
        self._carried = [
            (self._context[tensor.name], outputs[tensor.written])
            for tensor in meta.context
            if tensor.written is not None
        ]
        """Pairs of a context tensor and the output that replaces it."""
        self._low = np.array(meta.action.low, np.float32)
        self._high = np.array(meta.action.high, np.float32)
        self.chosen: Float32Array = outputs["actions"][0]
        """The last action before it was clipped to its bounds: the next step's ``action_in``, as in
        training."""
        self.begin()

    @classmethod
    def load(cls, folder: str | Path, *, trial: bool = True) -> OnnxPolicy:
        """Load a policy folder; this runs no code of the folder and opens no other file.

        Args:
            folder: The policy folder.
            trial: Whether to run a first step in another process before, within ``TRIAL_LIMIT_S``;
                not needed for a model that this process has just made.

        Raises:
            BridgeError: It cannot be read, is damaged or was changed, its two files do not belong
                together, or the model does more than a policy needs.
        """
        path = Path(folder) / MODEL_FILE
        data = load_metadata(folder)
        meta = PolicyMetadata.parse_file(folder, data)
        try:
            model = read_regular_file(path, MAX_MODEL_BYTES)
        except OSError as e:
            raise BridgeError(f"cannot read {path}: {e.strerror or e}") from e
        except ValueError as e:
            raise BridgeError(f"{path} is damaged: {e}") from e
        if hashlib.sha256(model).hexdigest() != meta.sha256:
            raise BridgeError(
                f"{path} is damaged or another policy's: not the SHA-256 of {METADATA_FILE}; "
                "export it again"
            )
        try:
            _compare_properties(check_onnx_file(model), model_properties(data))
            if trial:
                run_trial(model)
            return cls(meta, model)
        except BridgeError as e:
            raise BridgeError(f"{path}: {e}") from e

    def begin(self) -> None:
        """Start a trial: reset the context to its initial value."""
        for name, value in self._initial_context.items():
            self._context[name][...] = value
        self._inputs["action_in"][:] = 0.0
        self._inputs["first_in"][0] = 1.0

    def act(
        self, obs: ArrayLike, reward: float, done: bool, noise: ArrayLike | None = None
    ) -> Float32Array:
        """Return the action ``(act,)`` for an observation ``(obs,)``, clipped to its bounds.

        Args:
            obs: Observation in physical units.
            reward: Reward of the last action.
            done: True on the first step of every episode but the trial's first.
            noise: Standard normal numbers ``(noise,)`` for agents that explore; None is zeros.

        Raises:
            BridgeError: An input has the wrong shape, or an input or output is not finite; the
                context is left as it was.
        """
        inputs = self._inputs
        observed = inputs["obs"]
        earned = inputs["reward_in"]
        observed[:] = self._check_shape("obs", obs)
        earned[0] = reward
        inputs["done_in"][0] = done
        inputs["noise_in"][:] = 0.0 if noise is None else self._check_shape("noise_in", noise)

        # a dot product with itself is finite only where all elements are, and is several times
        # faster than isfinite().all()
        if not math.isfinite(observed @ observed + earned[0]):
            raise BridgeError(
                f"{self._name_bad_input(observed)} is not finite: no action was chosen"
            )
        self._session.run_with_iobinding(self._binding)
        for output in self._flat_outputs:
            if not math.isfinite(output @ output):
                raise BridgeError("the policy's answer is not finite: no action was chosen")

        # only now, when nothing can fail any more, does the context change
        for tensor, new_value in self._carried:
            tensor[...] = new_value
        inputs["action_in"][:] = self.chosen
        inputs["first_in"][0] = 0.0
        action: Float32Array = np.minimum(np.maximum(self.chosen, self._low), self._high)
        return action

    def context(self) -> dict[str, Float32Array]:
        """Return a copy of the context, name -> array."""
        return {name: array.copy() for name, array in self._context.items()}

    def set_context(self, context: Mapping[str, ArrayLike]) -> None:
        """Replace the context, all of it or nothing, at an episode boundary.

        Args:
            context: All tensors of the context, name -> array.

        Raises:
            BridgeError: Names or shapes are not those of this policy, or a number is not finite.
        """
        if context.keys() != self._context.keys():
            raise BridgeError(
                f"a context of {', '.join(context) or 'nothing'} is none of this policy, "
                f"which has {', '.join(self._context) or 'nothing'}"
            )
        arrays = {name: np.asarray(value, np.float32) for name, value in context.items()}
        for name, array in arrays.items():
            expected = self._context[name].shape
            if array.shape != expected:
                raise BridgeError(f"context {name} is of shape {array.shape}, not {expected}")
            if not np.isfinite(array).all():
                raise BridgeError(f"context {name} is not finite")

        for name, array in arrays.items():
            self._context[name][...] = array

    def _check_shape(self, name: str, value: ArrayLike) -> NDArray[Any]:
        array = np.asarray(value)
        expected = self._inputs[name].shape
        if array.shape != expected:
            raise BridgeError(
                f"{name.removesuffix('_in')} must be of shape {expected}, not {array.shape}"
            )
        return array

    def _name_bad_input(self, observed: Float32Array) -> str:
        """Return the name of the first observation that is not finite, or of what else is not."""
        bad = np.flatnonzero(~np.isfinite(observed)).tolist()
        if bad:
            return self.meta.observation_names[bad[0]]
        return "the reward or the observation's size"


def run_trial(model: bytes, limit_s: float = TRIAL_LIMIT_S) -> None:
    """Load a model and run one step of it in a process that is ended after ``limit_s``.

    Raises:
        BridgeError: It took longer, needed more memory than the process may have, or failed.
    """
    command = python_script(Path(trial_step.__file__))
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env=child_environment(),
            input=model,
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BridgeError(f"loading the model and a first step took over {limit_s:g} s") from None
    except OSError as e:
        raise BridgeError(f"cannot start {command[0]}: {e.strerror or e}") from e
    if done.stdout != b"ok":
        message = done.stdout.decode("ascii", "replace") or f"it ended with {done.returncode}"
        raise BridgeError(f"onnxruntime cannot run the model: {message}")


def _compare_properties(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise unless the metadata in a model are those of its ``policy.json``."""
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise BridgeError(
                f"it says that {show(key)} is {show(found.get(key))}, {METADATA_FILE} says "
                f"{show(expected.get(key))}: export the policy again"
            )


def _make_session(model: bytes) -> Any:
    """Return an onnxruntime session on one CPU thread."""
    try:
        return trial_step.make_session(model)
    except Exception as e:  # onnxruntime's errors share no base class
        message = trial_step.error_line(e)
        raise BridgeError(f"onnxruntime cannot read the model: {message}") from e


def _bind(bind: Any, name: str, buffer: Float32Array | None, shape: Shape) -> None:
    """Bind a buffer to one of the model's inputs or outputs for all steps."""
    if buffer is None or buffer.shape != shape:
        size = "none" if buffer is None else buffer.shape
        raise BridgeError(
            f"{name} is of shape {shape} to the model, {size} by what else policy.json says"
        )
    bind(name, "cpu", 0, np.float32, shape, buffer.ctypes.data)


def _check_nodes(what: str, nodes: Any, expected: Mapping[str, Shape]) -> None:
    """Raise unless a model's inputs or outputs are exactly those of its metadata."""
    found = {node.name: tuple(node.shape) for node in nodes}
    all_float32 = all(node.type == "tensor(float)" for node in nodes)
    if found != dict(expected) or not all_float32:
        raise BridgeError(
            f"the model's {what} are {_list_entries(found)}, "
            f"policy.json says {_list_entries(expected)}"
        )


def _list_entries(shapes: Mapping[str, Shape]) -> str:
    # the names may be a stranger's
    entries = [f"{ascii(name)[1:-1]} {shape}" for name, shape in shapes.items()]
    return ", ".join(entries) or "nothing"


def _initial_value(tensor: ContextTensor) -> Float32Array:
    """Return a context tensor's value at a trial's start."""
    try:
        if tensor.begin == "zeros":
            value = np.zeros(tensor.shape, np.float32)
        else:
            value = np.array(tensor.begin, np.float32)
    except (TypeError, ValueError) as e:
        raise BridgeError(f"context {tensor.name} begins with no array: {e}") from e
    if value.size != math.prod(tensor.shape):
        raise BridgeError(
            f"context {tensor.name} begins with {value.size} numbers, its shape is {tensor.shape}"
        )
    return value.reshape(tensor.shape)
