"""Damage policy folders at random, and check that each is refused in one line or means the same.

A folder is damaged as bad luck does it, with the hashes as they were, and as a stranger does it,
with the hashes and the model's own metadata renewed. What a stranger's folder says may be accepted,
but only within the bounds that ``check_accepted`` states independently of the package.
"""

import contextlib
import hashlib
import json
import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from file_mutations import change_digit, dump, mutate_bytes, mutate_json
from onnx import helper

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import (
    HASH_KEY,
    PolicyMetadata,
    content_digest,
    model_properties,
)
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.robots.lookup import make_robot

LIMIT_S = 60
"""A load that takes longer hangs."""
MAX_LINE_CHARS = 2000
LONGEST_STRUCTURE_BYTES = 32


@dataclass
class FuzzTable:
    """How often each kind of damage was tried, and what came of it."""

    refused: Counter[str] = field(default_factory=Counter)
    same: Counter[str] = field(default_factory=Counter)
    within_bounds: Counter[str] = field(default_factory=Counter)
    """A stranger's folder that was accepted, and asks for nothing that is out of bounds."""
    broken: list[str] = field(default_factory=list)
    """Kind of damage and what went wrong: a traceback, a hang, a silent change."""
    slowest_s: float = 0.0

    def lines(self) -> Iterator[str]:
        """Yield the lines of the table."""
        yield f"{'damage':<42}{'tried':>8}{'refused':>9}{'same':>8}{'in bounds':>11}"
        for kind in sorted(self.refused | self.same | self.within_bounds):
            counts = self.refused[kind], self.same[kind], self.within_bounds[kind]
            yield f"{kind:<42}{sum(counts):>8}{counts[0]:>9}{counts[1]:>8}{counts[2]:>11}"
        yield f"slowest: {self.slowest_s:.1f} s; promises broken: {len(self.broken)}"


def seal(folder: Path, text: str, model: bytes) -> None:
    """Write a folder with the hashes that go with its content, where there are such."""
    with contextlib.suppress(Exception):  # the model or the text may be damaged
        data = json.loads(text)
        with contextlib.suppress(Exception):
            described = onnx.load_model_from_string(model)
            helper.set_model_props(described, model_properties(data))
            model = described.SerializeToString()
        data["sha256"] = hashlib.sha256(model).hexdigest()
        data[HASH_KEY] = content_digest(data)
        text = json.dumps(data)
    (folder / "policy.json").write_text(text)
    (folder / "policy.onnx").write_bytes(model)


def fuzz_policy(
    original: Path, scratch: Path, count: int, seed: int, tick: Callable[[], None] = lambda: None
) -> FuzzTable:
    """Damage copies of the policy folder ``original`` ``count`` times, in ``scratch``."""
    rng = np.random.default_rng(seed)
    text = (original / "policy.json").read_bytes()
    model = (original / "policy.onnx").read_bytes()
    data = json.loads(text)
    meta = PolicyMetadata.load(original)
    table = FuzzTable()
    folder = scratch / "policy"
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "policy.json").write_bytes(text)
        (folder / "policy.onnx").write_bytes(model)

        how = str(
            rng.choice(["json", "onnx", "json, sealed", "onnx, sealed"], p=[0.4, 0.2, 0.3, 0.1])
        )
        trial = False
        if how == "json":
            kind, changed_text = _damage_text(text, rng)
            (folder / "policy.json").write_bytes(changed_text)
        elif how == "onnx":
            kind, changed_model = mutate_bytes(model, rng)
            (folder / "policy.onnx").write_bytes(changed_model)
        elif how == "json, sealed":
            kind, changed = mutate_json(data, rng)
            seal(folder, dump(changed), model)
        else:
            kind, changed_model = _damage_structure(model, rng)
            seal(folder, text.decode(), changed_model)
            trial = True
        _try(table, f"{how}: {kind}", folder, meta, sealed="sealed" in how, trial=trial)
        tick()
    return table


def _damage_text(text: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    draw = rng.random()
    if draw < 0.4:
        return "digit changed", change_digit(text, rng)
    if draw < 0.7:
        kind, changed = mutate_json(json.loads(text), rng)
        return kind, dump(changed).encode()
    return mutate_bytes(text, rng)


def _damage_structure(model: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Damage a model anywhere but in its weights, whose values a stranger may choose."""
    is_structure = np.ones(len(model), bool)
    for tensor in onnx.load_model_from_string(model).graph.initializer:
        # indices and shapes are structure
        if len(tensor.raw_data) > LONGEST_STRUCTURE_BYTES:
            start = model.index(bytes(tensor.raw_data))
            is_structure[start : start + len(tensor.raw_data)] = False
    place = int(rng.choice(np.flatnonzero(is_structure)))
    end = place + int(rng.integers(1, 64))
    kind, piece = mutate_bytes(model[place:end], rng)
    return kind, model[:place] + piece + model[end:]


def _try(
    table: FuzzTable, kind: str, folder: Path, meta: PolicyMetadata, *, sealed: bool, trial: bool
) -> None:
    """Load a damaged folder and note what happened."""
    started = time.monotonic()
    signal.alarm(LIMIT_S)  # its default action ends the process
    try:
        policy = OnnxPolicy.load(folder, trial=trial)
        if policy.meta == meta and not sealed:
            table.same[kind] += 1
        elif not sealed:
            table.broken.append(f"{kind}: silently changed")
        else:
            check_accepted(policy)
            table.within_bounds[kind] += 1
    except BridgeError as e:
        line = str(e)
        if "\n" in line or not line.isprintable() or len(line) > MAX_LINE_CHARS:
            table.broken.append(f"{kind}: refused in more than a line: {line[:200]!r}")
        table.refused[kind] += 1
    except Exception as e:  # what this looks for
        table.broken.append(f"{kind}: {type(e).__name__}: {str(e)[:200]}")
    finally:
        signal.alarm(0)
    table.slowest_s = max(table.slowest_s, time.monotonic() - started)


def check_accepted(policy: OnnxPolicy) -> None:
    """Check that a policy asks for nothing out of bounds, and acts, or refuses to.

    Raises:
        AssertionError: It does ask for such a thing.
    """
    meta = policy.meta
    joints = len(meta.joint_names)
    assert len(set(meta.joint_names)) == joints
    for values, low, high in (
        (meta.joint_stiffness, 0, 1e4),
        (meta.joint_damping, 0, 1e3),
        (meta.default_joint_pos, -100, 100),
        (meta.action_scale, 0, 100),
    ):
        assert len(values) == joints
        assert all(low <= x <= high for x in values)
    for joint, pose in zip(meta.joint_names, meta.default_joint_pos, strict=True):
        limit = meta.limits[joint]
        assert -100 <= limit.low <= pose <= limit.high <= 100
        assert 0 < limit.velocity <= 1e3
        assert 0 < limit.torque <= 1e4
    assert 0 < meta.control_hz <= 1e4
    assert 0 < meta.trial.horizon <= 1e6
    assert 0 < meta.trial.episodes <= 1e4
    bounds = [*meta.action.low, *meta.action.high]
    assert all(map(math.isfinite, bounds))
    assert len(meta.action.low) == len(meta.action.high) == len(meta.action.names)
    if meta.reward is not None:
        assert -1 <= meta.reward["upright"] <= 1

    with contextlib.suppress(BridgeError):  # the answer may be refused
        action = policy.act(np.zeros(len(meta.observation_names)), 0.0, False)
        assert np.isfinite(action).all()

    if joints:
        with contextlib.suppress(BridgeError):
            make_robot("unitree", meta)
            check_go2(meta)


def check_go2(meta: PolicyMetadata) -> None:
    """Check that a policy that a Go2's driver accepted is within a Go2's limits."""
    assert joints_of_go2() == set(meta.joint_names)
    for i, joint in enumerate(meta.joint_names):
        limit = meta.limits[joint]
        is_calf = joint.endswith("calf")
        assert limit.torque <= (45.44 if is_calf else 23.71)
        assert limit.velocity <= (15.71 if is_calf else 30.11)
        assert limit.low >= (-2.7228 if is_calf else -1.5709)
        assert limit.high <= (-0.8376 if is_calf else 4.538)
        assert 0 <= meta.joint_stiffness[i] <= 100
        assert 0 <= meta.joint_damping[i] <= 10


def joints_of_go2() -> set[str]:
    """Return the names of a Go2's joints."""
    legs = ("FR", "FL", "RR", "RL")
    return {f"{leg}_{part}" for leg in legs for part in ("hip", "thigh", "calf")}
