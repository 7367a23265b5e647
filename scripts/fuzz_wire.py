"""Break things on the wire, check what reaches the robot, and print when damping arrives.

    python scripts/fuzz_wire.py [--ticks 200000] [--repeats 5] [--seed 0]

First a Go2's DDS wire on a stepped clock: readings are lost, spoiled, frozen or implausible, the
policy or the driver fails, and a checker at the other end, which shares no code with the driver,
looks at the bytes of each command. 200,000 ticks take three minutes on a quiet machine.

Then real time, on a quiet machine: each repetition is a controller process with its guard process
that drives a robot over UDP at 50 Hz. Processes are killed or stopped too.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
from dds_wire import BOUND_S, FAULTS, SLOW, UNCERTAIN, fuzz_dds
from rich.progress import Progress
from wire_faults import ALL_FAULTS, NOTICED_AFTER_S, PERIOD_S, drive_and_break, write_policy_folder

from metarobot.bridge.safety.command_gate import damping_bounds_s


def fuzz_go2(ticks: int, seed: int) -> None:
    """Fuzz a Go2's wire on a stepped clock."""
    started = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("ticks", total=ticks)
        counts = fuzz_dds(
            ticks,
            seed,
            random.SystemRandom().randrange(1, 200),
            lambda done: progress.update(bar, completed=done),
        )
    seconds = time.monotonic() - started
    print(
        f"{counts['ticks']:,} ticks in {counts['runs']} runs, {counts['commands']:,} messages "
        f"checked, in {seconds:.0f} s: nothing unsafe"
    )
    print(f"damping within {1e3 * BOUND_S:.0f} ms of the last good reading, in addition for")
    for fault, seconds in SLOW.items():
        print(f"  {fault}: {1e3 * seconds:.0f} ms, while targets move")
    runs = {fault: counts[fault] for fault in FAULTS}
    print("runs with each fault: " + ", ".join(f"{name} {n}" for name, n in runs.items()))
    uncertain = sum(runs[fault] for fault in UNCERTAIN)
    print(f"noticed of {', '.join(UNCERTAIN)}: {counts['noticed']} of {uncertain}")


def time_faults(repeats: int, seed: int) -> None:
    """Measure when damping arrives, in real time."""
    rng = np.random.default_rng(seed)
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
            fault_ms = [1e3 * result.after_fault_s for result in results]
            line = (
                f"{fault:>14}: at most {max(reading_ms):5.1f} and {max(command_ms):5.1f}, "
                f"median {np.median(reading_ms):5.1f}"
            )
            if np.isfinite(fault_ms).all():
                line += f"; after the signal at most {max(fault_ms):5.1f}"
            if fault in NOTICED_AFTER_S:
                line += f"; stated {1e3 * NOTICED_AFTER_S[fault]:.0f} more"
            print(line)


def main() -> None:
    """Fuzz the wire, then time faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ticks", type=int, default=200_000, help="on the Go2's wire; 0: skip")
    parser.add_argument("--repeats", type=int, default=5, help="of each timed fault; 0: skip")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.ticks:
        fuzz_go2(options.ticks, options.seed)
    if options.repeats:
        time_faults(options.repeats, options.seed)


if __name__ == "__main__":
    main()
