import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import tiny_run

from metarobot.training.checkpoints import (
    best_entry,
    check_weights,
    latest_entry,
    read_checkpoint,
    save_checkpoint,
    sweep_temporary_files,
)
from metarobot.training.run_files import CONTENT_KEY, CheckpointError
from metarobot.training.run_folder import open_run, publish_agent
from metarobot.training.run_lock import LOCK_FILE, RunLock
from metarobot.training.train import open_training, train


def save(folder: Path, iteration: int, score: float | None = None) -> None:
    tensors = {"agent.w": torch.full((3,), float(iteration))}
    counters = {"iteration": iteration, "steps": 100 * iteration, "elapsed_s": 1.0, "score": score}
    save_checkpoint(folder, tensors, counters)


def iterations(folder: Path) -> list[int]:
    files = folder.glob("checkpoint-*.json")
    return sorted(json.loads(path.read_text())["iteration"] for path in files)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_last_three_and_the_best_are_kept(tmp_path: Path) -> None:
    for iteration, score in enumerate([None, -5.0, 9.0, 1.0, 2.0, 3.0, 4.0], start=1):
        save(tmp_path, iteration, score)
    assert iterations(tmp_path) == [3, 5, 6, 7]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert read_checkpoint(tmp_path).entry.iteration == 7


def test_a_folder_without_a_checkpoint_has_no_steps(tmp_path: Path) -> None:
    assert latest_entry(tmp_path) is None
    assert latest_entry(tmp_path / "missing") is None


def test_without_scores_the_last_three_are_kept(tmp_path: Path) -> None:
    for iteration in range(1, 6):
        save(tmp_path, iteration)
    assert iterations(tmp_path) == [3, 4, 5]
    assert best_entry([latest_entry(tmp_path)]) is None


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = ["checkpoint-mine.safetensors", "notes.json", ".checkpoint-hidden", ".vimrc"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    left = [".checkpoint-0123456789ab-x1y2z3w4.safetensors", ".config-abcdefgh.json"]
    for name in left:
        (tmp_path / name).write_text("half")
    for iteration in range(1, 6):
        save(tmp_path, iteration)
    sweep_temporary_files(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert set(foreign) <= names
    assert not set(left) & names


def test_the_newest_sound_checkpoint_is_used_and_a_line_tells(tmp_path: Path, caplog) -> None:
    for iteration in range(1, 4):
        save(tmp_path, iteration)
    newest = latest_entry(tmp_path)
    flip_last_byte(tmp_path / newest.weights)
    found = read_checkpoint(tmp_path)
    assert found.entry.iteration == 2
    assert torch.equal(found.tensors()["agent.w"], torch.full((3,), 2.0))
    (line,) = caplog.messages
    assert newest.weights in line
    assert "falling back to the checkpoint after 2 iterations" in line
    assert "\n" not in line

    (tmp_path / "checkpoint.json").write_text("{")
    (tmp_path / newest.weights).unlink()
    assert read_checkpoint(tmp_path).entry.iteration == 2
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_not_sound(tmp_path: Path) -> None:
    save(tmp_path, 1)
    counters = {"iteration": 2, "steps": 200, "elapsed_s": 1.0}
    save_checkpoint(tmp_path, {"agent.w": torch.tensor([float("nan")])}, counters)
    assert read_checkpoint(tmp_path).entry.iteration == 1


def test_a_fallback_is_resumed_with_the_uninterrupted_bits(tmp_path: Path, caplog) -> None:
    whole = tiny_run(tmp_path / "whole", steps=3200)
    broken = tiny_run(tmp_path / "broken", steps=3200)
    newest = latest_entry(broken.folder)
    flip_last_byte(broken.folder / newest.weights)
    assert train(open_run(broken.folder), show=False)
    assert latest_entry(broken.folder).sha256 == latest_entry(whole.folder).sha256
    assert sum("falling back" in line for line in caplog.messages) == 1
    assert len(list(broken.folder.glob("*.safetensors"))) == 3


def test_a_run_of_an_earlier_version_loads_and_resumes(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "old", steps=2400)
    folder = run.folder
    end = latest_entry(folder)
    # Such a folder has one checkpoint, here that after the second iteration, and no other hashes.
    entries = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*.json")]
    (second,) = (entry for entry in entries if entry["iteration"] == 2)
    for path in folder.glob("checkpoint-*"):
        if path.name != second["weights"]:
            path.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"format": 1}
    for key in (CONTENT_KEY, "made_from", "save_every_s"):
        config.pop(key)
        second.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoint.json").write_text(json.dumps(second))

    opened = open_run(folder)
    opened.load_agent()
    assert opened.steps == second["steps"]
    assert train(opened, show=False)
    assert latest_entry(folder).sha256 == end.sha256


def test_a_reader_beside_a_writer_always_finds_a_checkpoint(tmp_path: Path, caplog) -> None:
    save(tmp_path, 1)
    done = threading.Event()

    def write() -> None:
        for iteration in range(2, 150):
            save(tmp_path, iteration)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(read_checkpoint(tmp_path).entry.iteration)
    writer.join()
    assert seen == sorted(seen)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w", torch.zeros(3, 3), r"w is F32 \[3\], not F32 \[3, 3\]"),
        ("w", torch.zeros(3, dtype=torch.float64), r"w is F32 \[3\], not F64 \[3\]"),
        ("v", torch.zeros(3), r"v is missing, not F32 \[3\]"),
    ],
)
def test_weights_are_compared_with_the_agent_before_they_are_loaded(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        check_weights(read_checkpoint(tmp_path).data, {name: tensor})


@pytest.mark.parametrize("steps", [True, -1, 1e17, "5", None, 1.5])
def test_counters_are_checked(tmp_path: Path, steps: object, edit_json) -> None:
    save(tmp_path, 1)
    for path in tmp_path.glob("checkpoint*.json"):
        edit_json(path, "steps", steps)
    with pytest.raises(CheckpointError, match="steps is "):
        read_checkpoint(tmp_path)


def test_weights_outside_of_the_folder_are_refused(tmp_path: Path, edit_json) -> None:
    save(tmp_path, 1)
    for path in tmp_path.glob("checkpoint*.json"):
        edit_json(path, "weights", "../checkpoint.safetensors")
    with pytest.raises(CheckpointError, match="weights is "):
        read_checkpoint(tmp_path)


# One writer a run folder.


def test_a_second_writer_is_refused_by_name_until_the_first_ends(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "x", steps=400)
    training = open_training(run)
    with pytest.raises(CheckpointError, match=f"{run.folder} is being written by process"):
        open_training(open_run(run.folder))
    with pytest.raises(CheckpointError, match="is being written by"):
        publish_agent(open_run("CheetahDir-blind"), run.folder, {"summary": "x"})
    assert training.train(show=False)
    open_training(open_run(run.folder)).lock.release()
    assert not (run.folder / LOCK_FILE).exists()


def test_the_lock_of_a_killed_process_locks_nothing_and_tells_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path;"
        "from metarobot.training.run_lock import RunLock;"
        f"lock = RunLock(Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(CheckpointError, match=f"is being written by process {holder.pid}: "):
        RunLock(tmp_path)
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK_FILE).read_bytes() == b""
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_is_dropped_unlocks_its_folder(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "x", steps=400)
    open_training(run)
    RunLock(run.folder).release()


def test_a_lock_goes_with_a_folder_that_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with RunLock(tmp_path / "a"):
        (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(CheckpointError, match="is being written"):
            RunLock(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / LOCK_FILE).symlink_to(target)
    with pytest.raises(CheckpointError, match="cannot write"):
        RunLock(tmp_path / "x")
    assert not target.exists()
