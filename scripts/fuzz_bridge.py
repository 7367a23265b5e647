"""Throw faults of every kind at the controller and check what reaches the robot: ``fuzz_bridge.py
[TICKS] [SEED]``."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fuzzing import fuzz

ticks = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
began, met = time.monotonic(), fuzz(ticks, seed)
counts = {name: met.pop(name) for name in ("ticks", "commands", "runs")}
took = time.monotonic() - began
print(
    f"{counts['ticks']:,} steps, {counts['commands']:,} commands in {took:.0f} s; runs with each fault:"
)
for name, runs in sorted(met.items()):
    print(f"  {runs:>5} {name}")
print(
    "no command was non-finite, out of its limits or stale; damping followed each fault in time, and no command it"
)
