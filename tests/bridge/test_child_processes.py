"""No child process runs a file that merely lies in the working folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bridging import meta

import metarobot
from metarobot.bridge.adaptation_client import AdaptationClient
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy import onnx_policy
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.robots.sim_client import SimRobotClient
from metarobot.bridge.safety.guard_process import guard_process
from metarobot.bridge.tools.child_process import ChildProcess
from metarobot.bridge.tools.python_command import (
    child_environment,
    python_command,
    python_program,
    python_script,
)
from metarobot.bridge.tools.run_log import LogRow, RunLog
from metarobot.render import opengl

PACKAGE = Path(metarobot.__file__).parent
PLANTED_MODULES = (
    "random",
    "json",
    "numpy",
    "mcap",
    "rich",
    "tyro",
    "torch",
    "mujoco",
    "onnxruntime",
)
MARKER = "foreign code ran"


def adapting_meta() -> PolicyMetadata:
    return meta(adapts="between", run_path="nowhere")


def start_log_writer(folder: Path) -> None:
    row = LogRow({"tick": ["time"]})
    log = RunLog(folder / "log" / "run.mcap", row, {"policy": "p"})
    log.write_tick()
    log.close()


def start_panel(folder: Path) -> None:
    ChildProcess("tools.terminal_panel", "title").close()


def start_guard(folder: Path) -> None:
    with (
        pytest.raises(BridgeError, match="the guard process does not start"),
        guard_process(str(folder / "none"), "sim", {}, 0.02),
    ):
        pass


def start_simulated_robot(folder: Path) -> None:
    with pytest.raises(BridgeError, match="the simulated robot does not start"):
        SimRobotClient(meta(family="NoSuchFamily")).connect()


def start_adaptation_worker(folder: Path) -> None:
    client = AdaptationClient(adapting_meta(), rollouts=1)
    client.step(np.zeros(4), np.zeros(2), 0.0)
    client.end(np.zeros(4), failed=False)
    client.start({})
    assert client._process is not None
    client._process.wait(60)
    result = client.poll()
    assert result is not None
    assert "nowhere" in result.reason


def start_trial_step(folder: Path) -> None:
    with pytest.raises(BridgeError, match="onnxruntime cannot run the model"):
        onnx_policy.run_trial(b"no model", 60.0)


def start_opengl_probe(folder: Path) -> None:
    opengl._works("no_such_backend")


CHILDREN: dict[str, Callable[[Path], Any]] = {
    "log writer": start_log_writer,
    "terminal panel": start_panel,
    "guard process": start_guard,
    "simulated robot": start_simulated_robot,
    "adaptation worker": start_adaptation_worker,
    "first step of a model": start_trial_step,
    "OpenGL probe": start_opengl_probe,
}


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder full of modules that leave a mark when they are imported."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    for name in PLANTED_MODULES:
        code = f"open({str(folder / MARKER)!r}, 'a').write({name!r})\n"
        (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)
    # What many a shell's start-up file leaves: an empty entry, which means the working folder
    monkeypatch.setenv("PYTHONPATH", f":.:{folder}:{tmp_path / 'elsewhere'}")
    return folder


@pytest.mark.parametrize("child", CHILDREN)
def test_no_child_runs_what_lies_in_the_working_folder(child: str, hostile_folder: Path) -> None:
    CHILDREN[child](hostile_folder)
    assert not (hostile_folder / MARKER).exists()


def test_the_planted_modules_would_be_noticed(hostile_folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "metarobot.bridge.tools.run_log"], capture_output=True)
    assert (hostile_folder / MARKER).exists()


def test_commands_of_python_processes_are_made_in_one_place() -> None:
    """So that no child is forgotten here or in ``CHILDREN``."""
    # Two of the package's folders are links, which rglob does not follow
    folders = [PACKAGE, PACKAGE / "envs", PACKAGE / "agents"]
    files = {path.resolve() for folder in folders for path in folder.resolve().rglob("*.py")}
    texts = {f"{path.parent.name}/{path.name}": path.read_text() for path in files}
    users = {name for name, text in texts.items() if "sys.executable" in text}
    assert users == {"tools/python_command.py"}
    starters = {name for name, text in texts.items() if "import subprocess" in text}
    careful = {name for name in starters if "env=child_environment(" in texts[name]}
    # The film's child is ffmpeg; the probe changes its environment before it is used
    assert starters - careful == {"render/film.py", "render/opengl.py"}
    assert python_command("a.b", "c") == [sys.executable, "-P", "-m", "a.b", "c"]
    assert python_script(Path("/a.py")) == [sys.executable, "-P", "/a.py"]
    assert python_program("pass") == [sys.executable, "-P", "-c", "pass"]


def test_a_childs_module_path_has_no_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    path = os.pathsep.join(["", ".", "lib", str(tmp_path), str(tmp_path / "link"), "/opt/lib", ""])
    child = child_environment({"PYTHONPATH": path, "HOME": "/h"})
    assert child == {"PYTHONPATH": "/opt/lib", "HOME": "/h", "PYTHONSAFEPATH": "1"}
    assert child_environment({"PYTHONPATH": "."}) == {"PYTHONSAFEPATH": "1"}


def test_the_guard_finds_the_module_of_a_robot_of_ones_own() -> None:
    robots.make_robot("bridging:Slider", meta())
    assert robots.module_folder("bridging:Slider") == str(Path(__file__).resolve().parents[1])
    assert robots.module_folder("sim") == ""
    assert robots.module_folder("not_imported:Robot") == ""
    assert robots.module_folder("sys:Robot") == ""
