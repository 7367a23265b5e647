"""Robots by name, one controller at a time, and whether a policy fits."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import Meta
from metarobot.bridge.robot_interface import Layout, Reading, Robot

ROBOTS = {
    "sim": "metarobot.bridge.robots.sim_client:Sim",
    "ros2": "metarobot.bridge.robots.ros2:Ros2",
    "unitree": "metarobot.bridge.robots.unitree:Unitree",
}
"""Name -> module and class; what is not here is given as ``module:Class`` itself."""
LAYOUTS = {
    "legged": "metarobot.bridge.layouts.legged:Legged",
    "direct": "metarobot.bridge.layouts.named_signals:Direct",
}


def make(spec: str, meta: Meta, **settings: Any) -> Robot:
    """Make a robot, not connected yet; ``settings`` are the arguments of its class after the
    metadata.
    """
    kind = _find(
        ROBOTS.get(spec, spec),
        f"there is no robot {spec!r}; robots: {', '.join(ROBOTS)}, or module:Class",
    )
    known = [p.name for p in signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := [k for k in settings if k not in known]:
        raise BridgeError(
            f"robot {spec} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}"
        )
    try:
        robot: Robot = kind(meta, **settings)
    except (TypeError, ValueError, AttributeError) as e:
        raise BridgeError(f"robot {spec} does not take these settings: {e}") from e
    return robot


def layout(meta: Meta) -> Layout:
    """Make what turns readings into the policy's observations."""
    made: Layout = _find(LAYOUTS[meta.layout], meta.layout)(meta)
    return made


def _find(place: str, otherwise: str) -> Any:
    module, _, name = place.partition(":")
    if not name:
        raise BridgeError(otherwise)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise BridgeError(f"cannot load {place}: {e}") from e


def fits(meta: Meta, needed: tuple[str, ...], robot: Robot) -> Reading:
    """Return a reading of the robot; raise unless it holds all that the policy needs."""
    there = robot.get_observation()
    if missing := [key for key in needed if key not in there]:
        raise BridgeError(
            f"the policy, for {meta.family}, needs {_few(missing)}, which {robot.name} does not give; "
            f"it gives {_few(list(there))}"
        )
    return there


def rate(meta: Meta, hz: float, any_rate: bool) -> float:
    """Return the control rate, Hz: the policy's own if none is given; another must be wanted."""
    chosen = hz or meta.control_hz
    if not 0 < chosen <= 10_000:
        raise BridgeError(f"hz must be above 0 and at most 10000, not {chosen:g}")
    if abs(chosen / meta.control_hz - 1) > 1e-3 and not any_rate:
        raise BridgeError(
            f"the policy was trained at {meta.control_hz:g} Hz, not {chosen:g}; leave out --hz, or say --any-rate"
        )
    return chosen


@contextmanager
def alone(identity: str) -> Iterator[None]:
    """Hold the one place at a robot's controls on this machine; raise if another controller has
    it.
    """
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    path = folder / f"metarobot-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as e:
        raise BridgeError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        other = os.read(file, 32).decode(errors="replace").strip()
        os.close(file)
        raise BridgeError(
            f"{identity} has a controller already: process {other or '?'}; stop that first"
        ) from None
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        os.close(file)


def settings(words: Mapping[str, str]) -> dict[str, Any]:
    """Give settings from a command line their types: numbers, true and false, else text; ``a.b`` is
    ``b`` of ``a``.
    """
    typed: dict[str, Any] = {}
    for key, value in words.items():
        name, _, part = key.partition(".")
        if part:
            typed.setdefault(name, {})[part] = _typed(value)
        else:
            typed[name] = _typed(value)
    return typed


def _typed(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, … ({len(names)})"
