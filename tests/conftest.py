import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import tiny_run

from metarobot.checkpoint import Run, open_run
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


@pytest.fixture(scope="session")
def exported(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Path]]:
    """Export the tiny run of that name, or an agent in the box, when it is first asked for: the run, the policy."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from metarobot.export import export

    root, made = tmp_path_factory.mktemp("policies"), dict(runs)
    for memory in ("gru", "lstm"):
        made[memory] = tiny_run(root / "runs" / memory, steps=800, memory=memory, width=16)
    # torch's exporter sets up its table of operators anew each time, a second's work
    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))

    @cache
    def get(name: str) -> tuple[Run, Path]:
        run = made[name] if name in made else open_run(name)
        export(run, root / name, tasks=1)
        return run, root / name

    return get


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
