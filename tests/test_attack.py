"""The script that tries all promises of docs/security.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "attack.py"


def test_the_attacks_name_files_that_exist() -> None:
    text = SCRIPT.read_text()
    tests = set(re.findall(r'"([\w/]+/)?(test_\w+\.py)"', text))
    assert len(tests) > 10
    for folder, file in tests:
        assert (ROOT / "tests" / folder / file).is_file(), file
    for script in set(re.findall(r'"(fuzz_\w+\.py)"', text)):
        assert (ROOT / "scripts" / script).is_file(), script


@pytest.mark.slow
def test_all_promises_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
