"""Break things on the wire, on a quiet machine, and say when damping arrives: ``fuzz_wire.py
[REPEATS]``."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
from wire_faults import ALL, PERIOD, folder, strike

from metarobot.bridge.safety.command_gate import damping_bounds_s

repeats, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 5, np.random.default_rng(0)
reading, command = (1e3 * x for x in damping_bounds_s(PERIOD))
print(
    f"damping at 50 Hz, ms: stated {reading:.0f} after the last good reading, {command:.0f} after the last command"
)
with tempfile.TemporaryDirectory() as path:
    about = folder(Path(path))
    for fault in ALL:
        seen = [strike(about, fault, 0.4 + float(rng.uniform(0, PERIOD))) for _ in range(repeats)]
        readings, commands = (
            [1e3 * getattr(o, k) for o in seen] for k in ("after_reading", "after_command")
        )
        print(
            f"{fault:>14}: at most {max(readings):5.1f} and {max(commands):5.1f}, median {np.median(readings):5.1f}"
        )
