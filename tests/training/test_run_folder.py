import errno
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny_run

from metarobot.env.base import Env
from metarobot.files import FileError, atomic_path, read_json
from metarobot.learning.agent_interface import agents
from metarobot.training import checkpoints
from metarobot.training.checkpoints import save_checkpoint
from metarobot.training.config import TrainConfig
from metarobot.training.run_files import CONTENT_KEY, CheckpointError
from metarobot.training.run_folder import open_run, pretrained_names, publish_agent
from metarobot.types import Percept


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tiny_run(tmp_path / "x", steps=400).folder


def test_an_agent_comes_back_as_it_was(run: Path) -> None:
    tensors, counters = open_run(run).checkpoint()
    agent = open_run(run).load_agent()
    assert counters["steps"] == 800
    for name, value in agent.state_dict().items():
        assert torch.equal(value, tensors[f"agent.{name}"])


def test_a_folder_of_one_iteration_holds_one_weights_file_and_nothing_temporary(run: Path) -> None:
    assert len(list(run.glob("*.safetensors"))) == 1
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_nothing_is_pickled(run: Path) -> None:
    kinds = {p.suffix for p in run.iterdir() if "tfevents" not in p.name}
    assert kinds == {".json", ".jsonl", ".safetensors"}


def corrupt(run: Path) -> None:
    weights = next(run.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def truncate(run: Path) -> None:
    weights = next(run.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_weights(run: Path) -> None:
    next(run.glob("*.safetensors")).unlink()


def cut_counters(run: Path) -> None:
    for path in run.glob("checkpoint*.json"):
        path.write_text('{"iteration": 1')


def empty_counters(run: Path) -> None:
    for path in run.glob("checkpoint*.json"):
        path.write_text("{}")


def change_counters(run: Path) -> None:
    for path in run.glob("checkpoint*.json"):
        path.write_text(path.read_text().replace('"steps": 8', '"steps": 9'))


def fifo_for_weights(run: Path) -> None:
    weights = next(run.glob("*.safetensors"))
    weights.unlink()
    os.mkfifo(weights)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (corrupt, r"is damaged \(not the SHA-256"),
        (truncate, r"is damaged \(not the SHA-256"),
        (drop_weights, "cannot read .*safetensors: No such file"),
        (cut_counters, "checkpoint.json is damaged"),
        (empty_counters, "checkpoint.json is damaged"),
        (change_counters, "checkpoint.json was changed or is damaged"),
        (fifo_for_weights, "is damaged: it is not a regular file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(run: Path, harm, message: str) -> None:
    harm(run)
    with pytest.raises(FileError, match=message) as error:
        open_run(run).load_agent()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "is of format 99, this metarobot reads up to 2: upgrade"),
        ("kind", "something-else", "is not a metarobot run"),
        ("family", "Gone", "no family called 'Gone'"),
        ("agent", "gone", "no agent called 'gone'"),
    ],
)
def test_a_foreign_or_future_run_is_refused(
    run: Path, edit_json, key: str, value: object, message: str
) -> None:
    edit_json(run / "config.json", key, value)
    with pytest.raises(Exception, match=message):
        open_run(run)


def test_weights_of_another_agent_are_refused(run: Path, edit_json) -> None:
    edit_json(run / "config.json", "agent", "oracle")
    config = json.loads((run / "config.json").read_text())["agent_config"]
    edit_json(
        run / "config.json",
        "agent_config",
        {k: v for k, v in config.items() if k not in ("memory", "belief")},
    )
    with pytest.raises(CheckpointError, match=r"holds other weights than its config\.json says"):
        open_run(run).load_agent()


def test_settings_come_back_typed_and_what_is_missing_has_its_default(run: Path) -> None:
    opened = open_run(run)
    assert isinstance(opened.train_config, TrainConfig)
    assert isinstance(opened.agent_config, agents.get("rl2").config)
    assert (opened.train_config.steps, opened.agent_config.worlds) == (400, 4)
    config = json.loads((run / "config.json").read_text())
    del config["pool"], config["sim"], config["agent_config"]["teach"], config[CONTENT_KEY]
    (run / "config.json").write_text(json.dumps(config))
    assert open_run(run).train_config == opened.train_config  # an old run was simulated on the CPU
    assert open_run(run).agent_config == opened.agent_config


@pytest.mark.parametrize("where", ["", "agent_config"])
def test_an_unknown_setting_is_refused_in_one_line(run: Path, where: str) -> None:
    config = json.loads((run / "config.json").read_text())
    (config[where] if where else config)["tempo"] = 1
    del config[CONTENT_KEY]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not know: tempo; it knows: ") as error:
        open_run(run)
    assert "\n" not in str(error.value)


def test_a_changed_task_space_is_refused(run: Path, edit_json) -> None:
    edit_json(run / "tasks.json", "name", "Other")
    with pytest.raises(Exception, match="was changed after it was written"):
        open_run(run)


def test_an_unknown_folder_lists_the_agents_in_the_box() -> None:
    with pytest.raises(
        CheckpointError, match="no run folder 'nowhere', and no pretrained agent; there are: "
    ):
        open_run("nowhere")


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    with (
        pytest.raises(FileError, match=r"cannot write .*x.json: No space left on device"),
        atomic_path(target),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_save_that_fails_midway_leaves_the_last_checkpoint_whole(run: Path, monkeypatch) -> None:
    def full(path: Path, data: object) -> None:
        raise CheckpointError("cannot write: No space left on device")

    before, counters = open_run(run).checkpoint()
    monkeypatch.setattr(checkpoints, "write_sealed", full)
    with pytest.raises(CheckpointError):
        save_checkpoint(run, {k: v + 1 for k, v in before.items()}, counters)
    monkeypatch.undo()
    after, _ = open_run(run).checkpoint()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_published_agent_acts_the_same_without_its_optimiser(run: Path, tmp_path: Path) -> None:
    publish_agent(open_run(run), tmp_path / "box", {"summary": "tiny"})
    tensors, _ = open_run(tmp_path / "box").checkpoint()
    assert all(name.startswith("agent.") for name in tensors)
    a, b = (open_run(p).load_agent().state_dict() for p in (run, tmp_path / "box"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", pretrained_names())
def test_an_agent_in_the_box_is_small_loads_and_says_how_it_was_made(name: str) -> None:
    run = open_run(name)
    assert sum(p.stat().st_size for p in run.folder.iterdir()) < 3e6
    card = read_json(run.folder / "card.json")
    assert {"summary", "command", "seed", "steps", "wall_s"} <= card.keys()
    assert card["command"].startswith(f"metarobot train {run.family.name} --agent {run.agent} ")
    env = Env(run.family, run.family.space.sample("test", 2), threads=1)
    agent = run.load_agent()
    encoded = run.family.space.encode(env.tasks) if agent.privileged else None
    zeros = torch.zeros(2)
    percept = Percept(env.reset(0), torch.zeros(2, env.act_dim), zeros, zeros, zeros + 1)
    action, _ = agent.act(percept, agent.begin(2, encoded))
    assert action.shape == (2, env.act_dim)
    assert action.isfinite().all()
