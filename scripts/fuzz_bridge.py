"""Throw faults of every kind at the controller, and check what reaches the robot.

    python scripts/fuzz_bridge.py [TICKS] [SEED]

Time is stepped, so 100,000 ticks take half a minute.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fuzzing import fuzz

ticks = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0

started = time.monotonic()
runs_with_fault = fuzz(ticks, seed)
seconds = time.monotonic() - started

ticks = runs_with_fault.pop("ticks")
commands = runs_with_fault.pop("commands")
runs_with_fault.pop("runs")
print(f"{ticks:,} steps, {commands:,} commands in {seconds:.0f} s; runs with each fault:")
for fault, runs in sorted(runs_with_fault.items()):
    print(f"  {runs:>5} {fault}")
print(
    "no command was non-finite, out of its limits or stale; damping followed each fault in time, "
    "and no command it"
)
