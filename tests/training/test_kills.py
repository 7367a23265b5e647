"""A training that is killed at random moments, and resumed each time, gives the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest

from metarobot.training.checkpoints import latest_entry
from metarobot.training.metrics_log import read_metrics

KILL_LOOP = Path(__file__).parent / "kill_loop.py"


def check_equal_bits(root: Path, iterations: int, kills: int) -> None:
    """Train with and without so many kills, and compare."""
    done = subprocess.run(
        [sys.executable, KILL_LOOP, root, str(iterations), str(kills), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == kills

    whole = latest_entry(root / "whole")
    killed = latest_entry(root / "killed")
    assert killed.sha256 == whole.sha256
    assert killed.iteration == whole.iteration == iterations
    assert len(read_metrics(root / "killed" / "metrics.jsonl")) == iterations
    assert not [path.name for path in (root / "killed").iterdir() if path.name[0] == "."]


def test_three_kills_change_no_bit(tmp_path: Path) -> None:
    check_equal_bits(tmp_path, iterations=5, kills=3)


@pytest.mark.slow
def test_thirty_kills_change_no_bit(tmp_path: Path) -> None:
    check_equal_bits(tmp_path, iterations=60, kills=30)
