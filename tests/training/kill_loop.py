"""Train in child processes that are killed at random moments and resumed, until one is done.

    python kill_loop.py FOLDER ITERATIONS KILLS SEED

FOLDER/whole is trained without a kill, FOLDER/killed with them. The children are forked from this
process, which has imported everything, so that a kill costs no second of imports. Prints a line a
kill: the signal, and the iterations of the checkpoint after it.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from metarobot.learning.agent_interface import agents
from metarobot.training.checkpoints import latest_entry
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import open_run
from metarobot.training.train import open_training, start_training

STEPS_AN_ITERATION = 400
LONGEST_LIFE_S = 0.5
LONGEST_WAIT_S = 60.0


def train(folder: Path, iterations: int) -> bool:
    """Begin a training, or go on with it; return whether it is done."""
    if (folder / "config.json").exists():
        training = open_training(open_run(folder))
    else:
        config = TrainConfig(
            family="CheetahDir100",
            agent="rl2",
            steps=STEPS_AN_ITERATION * iterations,
            threads=1,
            save_every=2,
        )
        small = agents.get("rl2").config(worlds=2, width=16, minibatches=2, epochs=2)
        training = start_training(config, small, folder)
    return training.train(show=False)


def start_child(folder: Path, iterations: int) -> int:
    """Train in a child process; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(0 if train(folder, iterations) else 3)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)


def wait_for_change(path: Path) -> None:
    """Wait until a file is replaced."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    end_s = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < end_s:
        if path.exists() and path.stat().st_mtime_ns != before:
            return
        time.sleep(0.001)


def done_iterations(folder: Path) -> int:
    """Return the iterations of a folder's checkpoint; 0 if there is none."""
    entry = latest_entry(folder) if folder.exists() else None
    return 0 if entry is None else entry.iteration


def main() -> None:
    """Train once without a kill, once with as many as asked."""
    root = Path(sys.argv[1])
    iterations, kills, seed = (int(word) for word in sys.argv[2:5])
    rng = np.random.default_rng(seed)
    torch.set_num_threads(1)

    folder = root / "killed"
    for kill in range(kills):
        child = start_child(folder, iterations)
        number = int(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        # Half of them anywhere, half of them soon after a checkpoint, so that it goes on.
        if kill % 2:
            wait_for_change(folder / "checkpoint.json")
        time.sleep(float(rng.uniform(0, LONGEST_LIFE_S)))
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1:
            sys.exit("a training failed")
        print(f"{signal.Signals(number).name} {done_iterations(folder)}", flush=True)

    for name in ("killed", "whole"):
        _, status = os.waitpid(start_child(root / name, iterations), 0)
        if status:
            sys.exit(f"the training {name!r} did not end")


if __name__ == "__main__":
    main()
