import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metarobot import api
from metarobot.envs.robots import panda
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import families
from metarobot.training import identity
from metarobot.training.config import TrainConfig
from metarobot.training.identity import (
    folder_digest,
    model_digest,
    origin_differences,
    robot_digest,
)
from metarobot.training.run_folder import Run, open_run, pretrained_names
from metarobot.training.train import open_training, reopen_run, start_run

SMALL = agents.get("blind").config(worlds=2, width=4, minibatches=1, epochs=1)
CONFIG = TrainConfig(family="GraspFragile", agent="blind", steps=100, threads=1)


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    """A robot's file, and one that it includes."""
    spec = panda.panda()
    for site in spec.sites:
        spec.delete(site)
    for body in spec.bodies[1:]:
        body.ipos = np.nan_to_num(body.ipos)
    folder = tmp_path / "robots"
    folder.mkdir()
    text = spec.to_xml().replace("<worldbody>", '<include file="extra.xml"/><worldbody>', 1)
    (folder / "arm.xml").write_text(text)
    (folder / "extra.xml").write_text('<mujoco><size memory="10M"/></mujoco>')
    return folder / "arm.xml"


@pytest.fixture
def run(robot: Path, tmp_path: Path) -> Run:
    return start_run(replace(CONFIG, robot=str(robot)), SMALL, tmp_path / "run")


def test_nothing_is_told_where_nothing_has_changed(run: Run, caplog) -> None:
    assert origin_differences(run, training=True) == []
    open_training(run).lock.release()
    assert caplog.messages == []


@pytest.mark.parametrize("name", pretrained_names())
def test_of_agents_in_the_box_nothing_is_told(name: str) -> None:
    assert origin_differences(open_run(name)) == []


@pytest.mark.parametrize("name", ["arm.xml", "extra.xml"])
def test_a_changed_robot_file_is_told_in_one_line(run: Run, robot: Path, name: str, caplog) -> None:
    path = robot.parent / name
    path.write_text(path.read_text().replace("</mujoco>", "<!-- changed --></mujoco>"))
    open_training(open_run(run.folder)).lock.release()
    (line,) = caplog.messages
    assert line.startswith(
        f"warning: {run.folder} is not as it was made: its robot file has changed"
    )
    assert "\n" not in line


def test_a_changed_robot_changes_the_model(run: Run, robot: Path) -> None:
    robot.write_text(robot.read_text().replace('damping="', 'damping="1', 1))
    told = origin_differences(open_run(run.folder))
    assert told == ["its robot file has changed", "the model of GraspFragile has changed"]
    assert origin_differences(open_run(run.folder), other_robot=True) == []


def test_version_and_threads_are_told(run: Run, caplog, monkeypatch) -> None:
    monkeypatch.setattr(identity, "version", lambda package: "99.0")
    run = reopen_run(replace(CONFIG, threads=2), SMALL, run.folder)
    assert origin_differences(run, training=True) == [
        "it was trained with 1 threads, not 2",
        f"it was made with metarobot {run.config['versions']['metarobot']}, not 99.0",
    ]
    open_training(run).lock.release()
    assert "2; it was made with" in caplog.messages[0]
    assert "not bit for bit" in caplog.messages[0]
    # It is told once: from here on it is trained with two.
    assert open_run(run.folder).config["made_from"]["threads"] == 2
    assert len(origin_differences(open_run(run.folder), training=True)) == 1


def test_what_is_used_tells_of_the_model(run: Run, monkeypatch, caplog) -> None:
    monkeypatch.setattr(identity, "model_digest", lambda family: "0" * 64)
    api._open(run.folder)
    assert caplog.messages == [
        f"warning: {run.folder} is not as it was made: the model of GraspFragile has changed"
    ]


def test_a_relative_robot_resumes_from_another_working_folder(
    robot: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, robot="robots/arm.xml")
    start_run(config, SMALL, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in ("", "robots/arm.xml", "../robots/arm.xml"):
        again = reopen_run(replace(config, robot=given), SMALL, tmp_path / "run")
        assert again.train_config.robot == str(robot)


def test_a_robot_that_was_moved_is_found_by_its_content(
    run: Run, robot: Path, tmp_path: Path
) -> None:
    shutil.move(robot.parent, tmp_path / "moved")
    with pytest.raises(MetarobotError, match="no robot model"):
        reopen_run(CONFIG, SMALL, run.folder)
    moved = str(tmp_path / "moved" / "arm.xml")
    again = reopen_run(replace(CONFIG, robot=moved), SMALL, run.folder)
    assert again.train_config.robot == moved
    assert origin_differences(again) == []

    other = tmp_path / "moved" / "other.xml"
    other.write_text(Path(moved).read_text() + "<!-- another -->")
    with pytest.raises(MetarobotError, match=r"cannot resume .* with robot"):
        reopen_run(replace(CONFIG, robot=str(other)), SMALL, run.folder)


def test_a_model_has_one_hash_wherever_its_files_are(robot: Path, tmp_path: Path) -> None:
    shutil.copytree(robot.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / "arm.xml"
    assert robot_digest(str(copy)) == robot_digest(str(robot))
    on_robot = families.get("GraspFragile").deployment.on_robot
    assert model_digest(on_robot(str(copy))) == model_digest(on_robot(str(robot)))


def test_a_folder_has_a_hash_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = folder_digest(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert folder_digest(tmp_path / "a") not in ("", before)
    assert folder_digest(tmp_path / "missing") == ""


def test_a_run_tells_no_user_or_machine_by_its_hashes(run: Run) -> None:
    made_from = json.loads((run.folder / "config.json").read_text())["made_from"]
    assert all(isinstance(v, int) or len(v) in (0, 64) for v in made_from.values())
