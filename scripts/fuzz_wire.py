"""Break things on the wire, on a quiet machine, and print when damping arrives.

    python scripts/fuzz_wire.py [REPEATS]

Each repetition is a controller process that drives a robot over UDP at 50 Hz.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
from wire_faults import ALL_FAULTS, PERIOD_S, drive_and_break, write_policy_folder

from metarobot.bridge.safety.command_gate import damping_bounds_s

repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
rng = np.random.default_rng(0)

after_reading_s, after_command_s = damping_bounds_s(PERIOD_S)
print(
    f"damping at 50 Hz, ms: stated {1e3 * after_reading_s:.0f} after the last good reading, "
    f"{1e3 * after_command_s:.0f} after the last command"
)
with tempfile.TemporaryDirectory() as path:
    folder = write_policy_folder(Path(path))
    for fault in ALL_FAULTS:
        # A random phase of the control period
        delays_s = 0.4 + rng.uniform(0, PERIOD_S, repeats)
        results = [drive_and_break(folder, fault, float(delay_s)) for delay_s in delays_s]
        reading_ms = [1e3 * result.after_reading_s for result in results]
        command_ms = [1e3 * result.after_command_s for result in results]
        print(
            f"{fault:>14}: at most {max(reading_ms):5.1f} and {max(command_ms):5.1f}, "
            f"median {np.median(reading_ms):5.1f}"
        )
