"""Meta-train an agent once over a distribution of situations; it adapts to a new one within a few
episodes.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

__version__ = "0.1.0"


def _register(families: Iterable[str]) -> None:
    """Give families their Gymnasium ids, ``metarobot/<Name>-v0``, without importing them."""
    try:
        import gymnasium
    except ImportError:  # a robot does without it
        return
    for name in families:
        if (id_ := f"metarobot/{name}-v0") not in gymnasium.registry:
            gymnasium.register(
                id_,
                entry_point="metarobot.env.gymnasium_envs:GymEnv",
                vector_entry_point="metarobot.env.gymnasium_envs:GymVecEnv",
                kwargs={"family": name},
            )


def _draw_headless() -> None:
    """Let MuJoCo draw without a display, unless the user has chosen a way."""
    chosen = any(os.environ.get(k) for k in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform != "linux" or chosen:
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL(
            "libEGL.so.1"
        )  # without it MUJOCO_GL=egl would break the import of mujoco itself
        os.environ["MUJOCO_GL"] = "egl"


_draw_headless()
_register(sorted({e.name for e in entry_points(group="metarobot.families")}))
