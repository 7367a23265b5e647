"""Run folders that are odd or damaged: exit code 2, and one line on standard error."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run

from metarobot.training.run_folder import PRETRAINED_FOLDER

AGENT = PRETRAINED_FOLDER / "CheetahDir-blind"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(AGENT, tmp_path / "run")
    return tmp_path / "run"


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return harm


def without(name: str, key: str) -> Callable[[Path], None]:
    return changed(name, lambda data: {k: v for k, v in data.items() if k != key})


def text(name: str, content: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_text(content)

    return harm


def setting(name: str, literal: str) -> Callable[[Path], None]:
    """Set a setting of the agent to a literal that JSON may not even have."""

    def harm(folder: Path) -> None:
        path = folder / "config.json"
        data = json.loads(path.read_text())
        data["agent_config"][name] = "HERE"
        path.write_text(json.dumps(data).replace('"HERE"', literal))

    return harm


def fifo(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return harm


def endless(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return harm


HARMS: dict[str, Callable[[Path], None]] = {
    "nested": text("config.json", DEEP),
    "nested checkpoint": text("checkpoint.json", DEEP),
    "nested tasks": text("tasks.json", DEEP),
    "nested setting": setting("width", DEEP),
    "huge": text("config.json", " " * 5_000_000),
    "no object": text("config.json", "[1]"),
    "no format": without("config.json", "format"),
    "format of a list": changed("config.json", lambda data: {**data, "format": [1]}),
    "family of a list": changed("config.json", lambda data: {**data, "family": ["CheetahDir"]}),
    "agent of an object": changed("config.json", lambda data: {**data, "agent": {}}),
    "settings of a list": changed("config.json", lambda data: {**data, "agent_config": []}),
    "negative width": setting("width", "-1"),
    "absurd width": setting("width", "1000000000"),
    "true width": setting("width", "true"),
    "width of a text": setting("width", '"128"'),
    "huge integer": setting("width", "9" * 5000),
    "infinite": setting("lr", "1e999"),
    "not a number": setting("gamma", "NaN"),
    "list for a number": setting("lr", "[1]"),
    "unknown setting": setting("\\u202e", "1"),
    "tasks of a list": text("tasks.json", "[]"),
    "tasks of null": changed("tasks.json", lambda data: {**data, "params": None}),
    "counters of a list": text("checkpoint.json", "[]"),
    "negative steps": changed("checkpoint.json", lambda data: {**data, "steps": -1}),
    "weights elsewhere": changed(
        "checkpoint.json", lambda data: {**data, "weights": "/etc/passwd"}
    ),
    "config a fifo": fifo("config.json"),
    "checkpoint a fifo": fifo("checkpoint.json"),
    "endless config": endless("config.json"),
}


@pytest.mark.parametrize("name", HARMS)
def test_an_odd_run_folder_is_refused_in_one_line(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    HARMS[name](folder)
    code, out, errors = run(capsys, "evaluate", str(folder), "--tasks", "1", "--threads", "1")
    assert code == 2, errors
    assert out == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert errors.strip().isprintable()
    assert len(errors) < 2000


def test_an_absurd_size_is_refused_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "CheetahDir", "--agent", "blind", "--out", str(tmp_path / "x")]
    for width in ("1000000000", str(10**400)):
        code, _, errors = run(capsys, *argv, "--width", width)
        assert code == 2
        assert "error: width must be at most 4,096, not " in errors
    assert not (tmp_path / "x").exists()
