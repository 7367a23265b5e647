"""Headless OpenGL: which backend works here."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from typing import Any

from metarobot.errors import MetarobotError

_BACKENDS = {
    "egl": "egl",
    "osmesa": "osmesa",
    "glfw": "glfw",
    "glx": "glfw",
    "wgl": "glfw",
    "cgl": "cgl",
}


_HEADLESS = {"linux": ("egl", "osmesa"), "darwin": ("cgl",)}


_PROBE = """
import importlib, mujoco
context = importlib.import_module("mujoco.{}").GLContext(64, 64)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100.value)
"""


class VideoError(MetarobotError):
    """No OpenGL to draw with, or a video that cannot be written."""


@functools.cache
def backend() -> str:
    """Return the name of MuJoCo's OpenGL backend that works here, tried in another process: a bad
    one may abort it.
    """
    wish = os.environ.get("MUJOCO_GL", "").lower().strip()
    if wish in ("", "1", "on", "true", "enable", "enabled"):
        names: tuple[str, ...] = _HEADLESS.get(sys.platform, ("glfw",))
    else:
        names = (_BACKENDS[wish],) if wish in _BACKENDS else ()
    for name in names:
        if _works(name):
            return name
    tried = f"MUJOCO_GL={wish} gives none" if wish else f"tried {', '.join(names)}"
    raise VideoError(
        f"no OpenGL to draw with ({tried}): "
        "apt-get install libegl1 libopengl0 libgl1-mesa-dri (EGL) or libosmesa6 (OSMesa)"
    )


def _works(name: str) -> bool:
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    probe = [sys.executable, "-c", _PROBE.format(name)]
    try:
        return (
            subprocess.run(probe, env=environment, capture_output=True, timeout=60).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False


@functools.cache
def _gl() -> Any:
    return importlib.import_module(f"mujoco.{backend()}").GLContext(64, 64)
