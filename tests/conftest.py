import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_run

from metarobot.checkpoint import Run
from metarobot.studio import VideoError, backend


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One tiny run of each kind of agent, and a second seed of RL²."""
    root = tmp_path_factory.mktemp("runs")
    made = {name: tiny_run(root / name, agent=name) for name in ("rl2", "blind", "oracle", "maml")}
    made["rl2_seed1"] = tiny_run(root / "rl2_seed1", seed=1)
    return made


@pytest.fixture
def edit_json():
    """Change one key of a JSON file."""

    def edit(path: Path, key: str, value: object) -> None:
        data = json.loads(path.read_text())
        data[key] = value
        path.write_text(json.dumps(data))

    return edit


@pytest.fixture(scope="session")
def gl() -> None:
    """Skip where no picture can be drawn."""
    try:
        backend()
    except VideoError as e:
        pytest.skip(str(e))
