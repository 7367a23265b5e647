"""An exported agent at work: onnxruntime on one thread, its context kept here between steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy import onnx_file_check as onnxfile
from metarobot.bridge.policy.metadata import MODEL, Meta, Part, Shape

try:
    import onnxruntime
except ImportError as e:
    raise BridgeError("a policy needs onnxruntime: pip install onnxruntime") from e

Array = NDArray[np.float32]


class Policy:
    """A policy folder, loaded: ``begin`` a trial, ``act`` step by step, ``adopt`` what was learned
    between episodes.

    Inputs and outputs are buffers that are bound once. A step that fails leaves the context what it
    was.
    """

    def __init__(self, meta: Meta, model: bytes) -> None:
        self.meta = meta
        self._first = {part.name: _begin(part) for part in meta.context}
        self._parts = {name: first.copy() for name, first in self._first.items()}
        self._session = _session(model)
        _same("inputs", self._session.get_inputs(), meta.inputs)
        _same("outputs", self._session.get_outputs(), meta.outputs)
        widths = {
            "obs": len(meta.observation_names),
            "action_in": len(meta.action.names),
            "noise_in": meta.noise,
        }
        widths |= dict.fromkeys(("reward_in", "done_in", "first_in"), 1)
        inputs = {name: np.zeros((1, n), np.float32) for name, n in widths.items()}
        inputs |= {
            part.read: self._parts[part.name] for part in meta.context if part.read is not None
        }
        self._outputs = {name: np.zeros(shape, np.float32) for name, shape in meta.outputs.items()}
        self._binding = self._session.io_binding()
        for name, shape in meta.inputs.items():
            _bind(self._binding.bind_input, name, inputs.get(name), shape)
        for name, shape in meta.outputs.items():
            _bind(self._binding.bind_output, name, self._outputs[name], shape)
        self._told = {name: inputs[name][0] for name in widths}
        self._answers = [buffer.ravel() for buffer in self._outputs.values()]
        self._carried = [
            (self._parts[p.name], self._outputs[p.written])
            for p in meta.context
            if p.written is not None
        ]
        self._low, self._high = (
            np.array(x, np.float32) for x in (meta.action.low, meta.action.high)
        )
        self.chosen: Array = self._outputs["actions"][0]
        """The latest action before the clip: what the agent is told next, as it was in training."""
        self.begin()

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Load a policy folder; runs no code of its own. Raise ``BridgeError`` with one line if
        anything is amiss.
        """
        meta, path = Meta.load(folder), Path(folder) / MODEL
        try:
            data = path.read_bytes()
        except OSError as e:
            raise BridgeError(f"cannot read {path}: {e.strerror or e}") from e
        if hashlib.sha256(data).hexdigest() != meta.sha256:
            raise BridgeError(
                f"{path} is damaged or another policy's: not the SHA-256 of policy.json; export it again"
            )
        try:
            onnxfile.check(data)
            return cls(meta, data)
        except BridgeError as e:
            raise BridgeError(f"{path}: {e}") from e

    def begin(self) -> None:
        """Start a trial: the context as it was before anything was lived."""
        for name, first in self._first.items():
            self._parts[name][...] = first
        self._told["action_in"][:] = 0.0
        self._told["first_in"][0] = 1.0

    def act(
        self, obs: ArrayLike, reward: float, done: bool, noise: ArrayLike | None = None
    ) -> Array:
        """Return the action ``(act,)``, clipped to its bounds, for an observation ``(obs,)`` in
        physical units.

        ``reward`` is what the last action earned; ``done`` is true on the first step of every
        episode but the trial's first. ``noise`` ``(noise,)``, standard normal, is for agents that
        explore; None is zeros. Raises ``BridgeError`` where what comes in or would go out is not
        finite, and leaves the context alone then.
        """
        told = self._told
        seen, earned = told["obs"], told["reward_in"]
        seen[:], earned[0], told["done_in"][0] = self._checked("obs", obs), reward, done
        told["noise_in"][:] = 0.0 if noise is None else self._checked("noise_in", noise)
        # a dot product is finite only where all its terms are, and is several times faster than
        # isfinite().all()
        if not math.isfinite(seen @ seen + earned[0]):
            raise BridgeError(f"{self._odd(seen)} is not finite: no action was chosen")
        self._session.run_with_iobinding(self._binding)
        for answer in self._answers:
            if not math.isfinite(answer @ answer):
                raise BridgeError("the policy's answer is not finite: no action was chosen")
        for kept, written in self._carried:
            kept[...] = written
        told["action_in"][:] = self.chosen
        told["first_in"][0] = 0.0
        action: Array = np.minimum(np.maximum(self.chosen, self._low), self._high)
        return action

    def context(self) -> dict[str, Array]:
        """Return a copy of the context, name -> array."""
        return {name: array.copy() for name, array in self._parts.items()}

    def adopt(self, context: Mapping[str, ArrayLike]) -> None:
        """Take over a context, all of it or nothing: at an episode's boundary, what was learned
        from the last one.
        """
        if context.keys() != self._parts.keys():
            raise BridgeError(
                f"a context of {_listed(context)} is none of this policy, which has {_listed(self._parts)}"
            )
        taken = {name: np.asarray(array, np.float32) for name, array in context.items()}
        for name, array in taken.items():
            if array.shape != self._parts[name].shape:
                raise BridgeError(
                    f"context {name} is of shape {array.shape}, not {self._parts[name].shape}"
                )
            if not np.isfinite(array).all():
                raise BridgeError(f"context {name} is not finite")
        for name, array in taken.items():
            self._parts[name][...] = array

    def _checked(self, name: str, given: ArrayLike) -> NDArray[Any]:
        array, place = np.asarray(given), self._told[name]
        if array.shape != place.shape:
            raise BridgeError(
                f"{name.removesuffix('_in')} must be of shape {place.shape}, not {array.shape}"
            )
        return array

    def _odd(self, seen: Array) -> str:
        bad = np.flatnonzero(~np.isfinite(seen))
        return (
            self.meta.observation_names[bad[0]]
            if len(bad)
            else "the reward or the observation's size"
        )


def _session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors share no base
        raise BridgeError(
            f"onnxruntime cannot read the model: {' '.join(str(e).split())[:200]}"
        ) from e


def _bind(bind: Any, name: str, buffer: Array | None, shape: Shape) -> None:
    """Lend the model a buffer for good."""
    if buffer is None or buffer.shape != shape:
        size = "none" if buffer is None else buffer.shape
        raise BridgeError(
            f"{name} is of shape {shape} to the model, {size} by what else policy.json says"
        )
    bind(name, "cpu", 0, np.float32, shape, buffer.ctypes.data)


def _same(what: str, nodes: Any, said: Mapping[str, Shape]) -> None:
    """Raise unless a model takes or gives just what its metadata says."""
    found = {node.name: tuple(node.shape) for node in nodes}
    if found != dict(said) or any(node.type != "tensor(float)" for node in nodes):
        raise BridgeError(
            f"the model's {what} are {_listed(found)}, policy.json says {_listed(said)}"
        )


def _listed(named: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{k} {np.shape(v) if hasattr(v, 'shape') else v}" for k, v in named.items())
        or "nothing"
    )


def _begin(part: Part) -> Array:
    try:
        first = (
            np.zeros(part.shape, np.float32)
            if part.begin == "zeros"
            else np.array(part.begin, np.float32)
        )
    except (TypeError, ValueError) as e:
        raise BridgeError(f"context {part.name} begins with no array: {e}") from e
    if first.size != math.prod(part.shape):
        raise BridgeError(
            f"context {part.name} begins with {first.size} numbers, its shape is {part.shape}"
        )
    return first.reshape(part.shape)
