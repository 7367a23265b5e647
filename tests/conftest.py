import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import tiny_run

from metarobot.learning.agent_interface import agents
from metarobot.learning.recurrent_memories import MEMORIES
from metarobot.render.opengl import VideoError, backend
from metarobot.training.run_folder import Run, open_run


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
def exported(
    runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, Path]]:
    """Export the tiny run of that name, or an agent in the box, when it is first asked for: the
    run, the policy."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from metarobot.deploy.onnx_export import export

    root = tmp_path_factory.mktemp("policies")
    # torch's exporter sets up its table of operators anew each time, a second's work
    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))

    def made(name: str) -> Run:
        if name in runs:
            return runs[name]
        if name in MEMORIES:
            return tiny_run(root / "runs" / name, steps=800, memory=name, width=16)
        return (
            tiny_run(root / "runs" / name, agent=name, steps=800)
            if name in agents.names()
            else open_run(name)
        )

    @cache
    def get(name: str) -> tuple[Run, Path]:
        run = made(name)
        export(run, root / name, tasks=1)
        return run, root / name

    return get


@pytest.fixture
def edit_json():
    """Change one key of a JSON file, and take away the hash that would tell."""

    def edit(path: Path, key: str, value: object) -> None:
        data = json.loads(path.read_text())
        data.pop("content_sha256", None)
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
