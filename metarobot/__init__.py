"""Meta-train robots that adapt to a new situation within a few episodes.

The public interface is what this module names; everything else may move. Its functions are imported
when they are first used, so that ``import metarobot`` is fast.
"""

import contextlib
import ctypes
import os
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from metarobot import _moved
from metarobot.env.gymnasium_ids import register_gymnasium_ids

if TYPE_CHECKING:
    from metarobot.api import (
        agents,
        compare,
        evaluate,
        export,
        families,
        family,
        load_agent,
        make_env,
        render,
        train,
    )
    from metarobot.tasks.space import TaskSpace

__version__ = "0.1.0"

__all__ = [
    "TaskSpace",
    "agents",
    "compare",
    "evaluate",
    "export",
    "families",
    "family",
    "load_agent",
    "make_env",
    "render",
    "train",
]

_SPIN_COUNT = 5_000
"""Iterations that an OpenMP thread spins at a barrier before it sleeps."""
_DISPLAY_VARIABLES = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "TaskSpace":
        from metarobot.tasks.space import TaskSpace

        return TaskSpace
    from metarobot import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _render_without_display() -> None:
    """Let MuJoCo render through EGL where there is no display and the user has chosen nothing."""
    if sys.platform != "linux" or any(os.environ.get(k) for k in _DISPLAY_VARIABLES):
        return
    with contextlib.suppress(OSError):
        # MUJOCO_GL=egl without this library would break the import of mujoco itself.
        ctypes.CDLL("libEGL.so.1")
        os.environ["MUJOCO_GL"] = "egl"


def _limit_spinning() -> None:
    """Let torch's OpenMP threads give way to other programs while they wait for each other.

    GNU's OpenMP spins for up to 30 billion iterations at every barrier. Beside other busy
    processes that burns the cores the work needs: a training ran at a quarter of the speed that it
    has with a short spin, which costs nothing measurable on an idle machine. Read by the library
    when torch loads it; a choice of the user's is left alone.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))


_moved.install()
_limit_spinning()
_render_without_display()
register_gymnasium_ids(sorted({entry.name for entry in entry_points(group="metarobot.families")}))
