"""Find a robot or a signal layout by name, and check that a policy and a robot fit together."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import MAX_CONTROL_HZ, PolicyMetadata
from metarobot.bridge.robot_interface import Reading, Robot, SignalLayout
from metarobot.bridge.robots.joint_bounds import HasJointBounds, check_joint_bounds

ROBOTS = {
    "sim": "metarobot.bridge.robots.sim_client:SimRobotClient",
    "ros2": "metarobot.bridge.robots.ros2:Ros2Robot",
    "unitree": "metarobot.bridge.robots.unitree:UnitreeRobot",
}
"""Name -> ``module:Class``. Any other robot is given as ``module:Class`` itself, as a subclass of
``metarobot.bridge.robots.lerobot.LeRobotAdapter`` is."""
LAYOUTS = {
    "legged": "metarobot.bridge.layouts.legged:LeggedLayout",
    "direct": "metarobot.bridge.layouts.named_signals:NamedSignalsLayout",
}
"""Value of ``layout`` in policy.json -> ``module:Class``."""
MAX_LISTED_NAMES = 4
"""Longer lists of names are shortened in messages."""


def make_robot(spec: str, meta: PolicyMetadata, **settings: Any) -> Robot:
    """Build a robot, not connected yet, from its name or ``module:Class``.

    Args:
        spec: A name of ``ROBOTS``, or ``module:Class``.
        meta: Metadata of the policy that will drive it; the first argument of the class.
        settings: Keyword arguments of the class.

    Raises:
        BridgeError: There is no such robot, it does not take these settings, or the policy asks
            more of a joint than this robot allows.
    """
    robot_class = _load_class(
        ROBOTS.get(spec, spec),
        f"there is no robot {spec!r}; robots: {', '.join(ROBOTS)}, or module:Class",
    )
    parameters = signature(robot_class).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if unknown := [name for name in settings if name not in known]:
        raise BridgeError(
            f"robot {spec} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}"
        )
    bounds = robot_class.joint_bounds if isinstance(robot_class, HasJointBounds) else {}
    if bounds and meta.layout == "direct":
        raise BridgeError(
            f"robot {spec} needs a policy of layout 'legged', not 'direct': "
            "only its commands have limits of speed and torque"
        )
    check_joint_bounds(spec, bounds, meta)
    try:
        robot: Robot = robot_class(meta, **settings)
    except (TypeError, ValueError, AttributeError) as e:
        raise BridgeError(f"robot {spec} does not take these settings: {e}") from e
    return robot


def module_folder(spec: str) -> str:
    """Return the folder from which the module of a ``module:Class`` was imported.

    Empty for this package's robots, which every process finds by itself.
    """
    package = spec.partition(":")[0].partition(".")[0]
    if spec in ROBOTS or package not in sys.modules:
        return ""
    file = vars(sys.modules[package]).get("__file__")
    if not file:
        return ""
    path = Path(file).resolve()
    is_package = path.name == "__init__.py"
    return str(path.parents[1] if is_package else path.parent)


def make_layout(meta: PolicyMetadata) -> SignalLayout:
    """Build the layout that a policy's metadata names: it turns readings into observations."""
    layout: SignalLayout = _load_class(LAYOUTS[meta.layout], meta.layout)(meta)
    return layout


def _load_class(place: str, message: str) -> Any:
    """Import ``module:Class``; raise ``BridgeError`` with ``message`` if it is not of this form."""
    module, _, name = place.partition(":")
    if not name:
        raise BridgeError(message)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise BridgeError(f"cannot load {place}: {e}") from e


def check_robot_readings(meta: PolicyMetadata, needed: tuple[str, ...], robot: Robot) -> Reading:
    """Return a reading of the robot.

    Raises:
        BridgeError: It lacks one of the keys ``needed``.
    """
    reading = robot.get_observation()
    if missing := [key for key in needed if key not in reading]:
        raise BridgeError(
            f"the policy, for {meta.family}, needs {shortened_list(missing)}, which {robot.name} "
            f"does not give; it gives {shortened_list(list(reading))}"
        )
    return reading


def control_rate_hz(meta: PolicyMetadata, hz: float, any_rate: bool) -> float:
    """Return the control rate, Hz: the policy's own if ``hz`` is 0.

    Raises:
        BridgeError: A rate out of range, or another than the policy's without ``any_rate``.
    """
    chosen = hz or meta.control_hz
    if not 0 < chosen <= MAX_CONTROL_HZ:
        raise BridgeError(f"hz must be above 0 and at most {MAX_CONTROL_HZ:g}, not {chosen:g}")
    if abs(chosen / meta.control_hz - 1) > 1e-3 and not any_rate:
        raise BridgeError(
            f"the policy was trained at {meta.control_hz:g} Hz, not {chosen:g}; "
            "leave out --hz, or say --any-rate"
        )
    return chosen


@contextmanager
def exclusive_control(identity: str) -> Iterator[None]:
    """Hold the lock of a robot on this machine: one controller at a time may drive it.

    Raises:
        BridgeError: Another process holds the lock, or it cannot be written.
    """
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    path = folder / f"metarobot-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.lock"
    try:
        # the folder may be shared: never follow a link that somebody else has put there
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

    # the lock ends with the process, however it ends; the number is for the message above
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        os.close(file)


def parse_settings(words: Mapping[str, str]) -> dict[str, Any]:
    """Give settings from a command line their types.

    Numbers, ``true`` and ``false`` are recognised, everything else is text. The key ``a.b`` is the
    entry ``b`` of a dict ``a``.
    """
    typed: dict[str, Any] = {}
    for key, value in words.items():
        name, _, entry = key.partition(".")
        if entry:
            typed.setdefault(name, {})[entry] = _parse_value(value)
        else:
            typed[name] = _parse_value(value)
    return typed


def _parse_value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def shortened_list(names: Sequence[str]) -> str:
    """Return names separated by commas; of a long list the first three, and their number."""
    if len(names) <= MAX_LISTED_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: MAX_LISTED_NAMES - 1])}, … ({len(names)})"
