"""Headless OpenGL: which backend works on this machine, and its context."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from typing import Any

from metarobot.bridge.tools.python_command import child_environment, python_program
from metarobot.errors import MetarobotError

BACKEND_OF_SETTING = {
    "egl": "egl",
    "osmesa": "osmesa",
    "glfw": "glfw",
    "glx": "glfw",
    "wgl": "glfw",
    "cgl": "cgl",
}
"""Value of the environment variable MUJOCO_GL -> MuJoCo's backend."""

AUTOMATIC_SETTINGS = ("", "1", "on", "true", "enable", "enabled")
"""Values of MUJOCO_GL that leave the choice open."""

HEADLESS_BACKENDS = {"linux": ("egl", "osmesa"), "darwin": ("cgl",)}
"""Platform -> backends that need no display, best first; elsewhere it is glfw."""

PROBE_TIMEOUT_S = 60

PROBE_PROGRAM = """
import importlib, mujoco
context = importlib.import_module("mujoco.{}").GLContext(64, 64)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco/>")
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
"""
"""Python program that fails, or aborts, where the backend does not work."""


class VideoError(MetarobotError):
    """No OpenGL to draw with, or a video that cannot be written."""


@functools.cache
def backend() -> str:
    """Return the name of MuJoCo's OpenGL backend that works here.

    Each is tried in a process of its own, which a broken backend may abort.

    Raises:
        VideoError: None works; the message says what to install.
    """
    setting = os.environ.get("MUJOCO_GL", "").lower().strip()
    if setting in AUTOMATIC_SETTINGS:
        candidates: tuple[str, ...] = HEADLESS_BACKENDS.get(sys.platform, ("glfw",))
    elif setting in BACKEND_OF_SETTING:
        candidates = (BACKEND_OF_SETTING[setting],)
    else:
        candidates = ()

    for name in candidates:
        if _works(name):
            return name

    tried = f"tried {', '.join(candidates)}"
    if setting:
        tried = f"MUJOCO_GL={setting} gives none"
    raise VideoError(
        f"no OpenGL to draw with ({tried}): "
        "apt-get install libegl1 libopengl0 libgl1-mesa-dri (EGL) or libosmesa6 (OSMesa)"
    )


def _works(name: str) -> bool:
    """Return whether a backend draws, tried in another process."""
    environment = child_environment()
    environment.pop("MUJOCO_GL", None)
    command = python_program(PROBE_PROGRAM.format(name))
    try:
        probe = subprocess.run(  # noqa: S603
            command, env=environment, capture_output=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


@functools.cache
def opengl_context() -> Any:
    """Return the one OpenGL context that everything in this process draws with."""
    # Its own size does not matter: pictures are drawn into off-screen buffers.
    return importlib.import_module(f"mujoco.{backend()}").GLContext(64, 64)
