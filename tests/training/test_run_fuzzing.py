from pathlib import Path

import pytest
from run_fuzzing import fuzz_run, make_folder

CHANGES = 60


@pytest.mark.parametrize("seed", [0])
def test_a_damaged_run_folder_is_refused_in_one_line_or_means_the_same(
    tmp_path: Path, seed: int
) -> None:
    table = fuzz_run(make_folder(tmp_path), tmp_path, CHANGES, seed)
    assert table.broken == []
    assert sum(table.refused.values()) > CHANGES / 3
