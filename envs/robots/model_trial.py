"""Compile the MJCF file given, within limits on time and memory; print its sizes as JSON.

A program of its own: ``model_check`` starts it, and it imports MuJoCo alone.
"""

import json
import resource
import sys

import mujoco
import numpy as np

CPU_S = 15
"""A published arm with seventy meshes takes about two seconds."""
MEMORY_BYTES = 4 << 30
"""Of address space."""
MAX_NUMBER = 1e10
"""MuJoCo takes larger numbers in the state for a simulation that diverged."""
SIZES = (
    "nbody",
    "ngeom",
    "nv",
    "nsite",
    "nsensordata",
    "nmeshvert",
    "nmeshface",
    "nhfielddata",
    "ntexdata",
    "nflexvert",
    "nbuffer",
    "narena",
)


def main() -> None:
    """Print the sizes, or an error."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, object]
    try:
        model = mujoco.MjSpec.from_file(sys.argv[1]).compile()
        for name in ("body_mass", "body_inertia", "body_pos", "geom_size", "qpos0", "dof_armature"):
            # NaN fails the comparison, too
            if not (np.abs(getattr(model, name)) <= MAX_NUMBER).all():
                raise ValueError(f"its {name} has numbers that are not finite, or over 1e10")
        answer = {"sizes": {name: int(getattr(model, name)) for name in SIZES}}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as e:  # whatever MuJoCo raises
        if "unknown exception" in str(e):  # as it calls a failed allocation
            e = ValueError("it takes too much memory, or a number in it is far too large")
        answer = {"error": ascii(" ".join(str(e).split()))[1:-1][:500]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
