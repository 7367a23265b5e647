"""Damage files that metarobot reads, and check that each is refused in one line or means the same.

    python scripts/fuzz_files.py policy --count 10000 --seed 0

Exit code 1 if one was not: a traceback, a hang, or a silent change.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

POLICY_AGENT = "QuadrupedMix-rl2"


def fuzz_policy_folder(count: int, seed: int, tick: Callable[[], None]) -> int:
    """Damage an export of an agent in the box; print a table, and return what was not refused."""
    from policy_fuzzing import fuzz_policy

    from metarobot.deploy.onnx_export import export
    from metarobot.training.run_folder import open_run

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "original"
        export(open_run(POLICY_AGENT), original, tasks=1)
        table = fuzz_policy(original, Path(scratch), count, seed, tick)
    print("\n".join(table.lines()))
    for line in table.broken[:20]:
        print(f"broken: {line}")
    return len(table.broken)


def fuzz_run_log(count: int, seed: int, tick: Callable[[], None]) -> int:
    """Damage the log of a run; print a table, and return what was not refused."""
    from log_fuzzing import fuzz_log

    with tempfile.TemporaryDirectory() as scratch:
        table = fuzz_log(Path(scratch), count, seed, tick)
    print("\n".join(table.lines()))
    for line in table.broken[:20]:
        print(f"broken: {line}")
    return len(table.broken)


def fuzz_model_file(count: int, seed: int, tick: Callable[[], None]) -> int:
    """Damage our arm's model file; one in fifty goes to a child process, as all would."""
    from model_fuzzing import fuzz_models

    from metarobot.envs.robots import panda

    text = panda.panda().to_xml().encode()
    with tempfile.TemporaryDirectory() as scratch:
        happened, broken = fuzz_models(text, Path(scratch), count, seed, tick, child_share=0.02)
    return _print_table(happened, broken)


def fuzz_dataset(count: int, seed: int, tick: Callable[[], None]) -> int:
    """Damage a Minari folder with recorded demonstrations of one task."""
    from dataset_fuzzing import fuzz_datasets

    from metarobot.tasks.family import families
    from metarobot.training.demonstrations import record_demonstrations

    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "demos"
        record_demonstrations(families.get("Placement"), original, tasks=1, shots=1)
        happened, broken = fuzz_datasets(original, Path(scratch), count, seed, tick)
    return _print_table(happened, broken)


def _print_table(happened: Mapping[str, int], broken: Sequence[str]) -> int:
    """Print what happened, and return how many promises were broken."""
    for what, count in sorted(happened.items()):
        print(f"{what}: {count}")
    print(f"promises broken: {len(broken)}")
    for line in broken[:20]:
        print(f"broken: {line}")
    return len(broken)


def fuzz_run_folder(count: int, seed: int, tick: Callable[[], None]) -> int:
    """Damage a published agent; print a table, and return what was not refused."""
    from run_fuzzing import fuzz_run, make_folder

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        original = make_folder(Path(scratch))
        table = fuzz_run(original, Path(scratch), count, seed, tick)
    print("\n".join(table.lines()))
    for line in table.broken[:20]:
        print(f"broken: {line}")
    return len(table.broken)


FUZZERS: dict[str, Callable[[int, int, Callable[[], None]], int]] = {
    "model": fuzz_model_file,
    "dataset": fuzz_dataset,
    "policy": fuzz_policy_folder,
    "run": fuzz_run_folder,
    "log": fuzz_run_log,
}
"""Kind of file -> (count, seed, function to call after each) -> how many promises were broken."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=FUZZERS, help="kind of file")
    parser.add_argument("--count", type=int, default=10_000, help="files to damage")
    parser.add_argument("--seed", type=int, default=0, help="draws the damage")
    options = parser.parse_args()

    with Progress() as progress:
        task = progress.add_task(options.kind, total=options.count)
        broken = FUZZERS[options.kind](options.count, options.seed, lambda: progress.advance(task))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
