"""The package as a whole: what it lists, exports, imports and calls things."""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections import defaultdict

import pytest

import metarobot
from metarobot._moved import NEW_PLACES

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"metarobot": "metarobot", "envs": "metarobot.envs", "agents": "metarobot.agents"}
"""Folder -> the package in it."""
LINE_LENGTH = 100
TYPE_NAME = re.compile(r"_?[A-Z]+[a-z]\w*")
"""What a class or a type alias is called."""


def sources() -> list[pathlib.Path]:
    """All files of the package, each once: rglob does not follow the two links."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def shown(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_package_folder_is_listed() -> None:
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_links_lead_to_the_real_folders() -> None:
    for name in ("envs", "agents"):
        link = ROOT / "metarobot" / name
        assert link.is_symlink()
        assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_the_bare_name_is_refused(name: str) -> None:
    assert f"import metarobot.{name}, not {name}" in python("-c", f"import {name}").stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import metarobot, sys; print({'torch', 'mujoco', 'tyro'} & set(sys.modules))"
    assert python("-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_give_way_unless_the_user_chose(
    chosen: dict[str, str], spins: str
) -> None:
    usual = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import metarobot, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=usual | chosen, capture_output=True, text=True
    )
    assert done.stdout.strip() == spins


def test_listing_the_families_does_without_torch() -> None:
    list_all = "import metarobot as mr, sys; [mr.family(name) for name in mr.families()]; "
    done = python("-c", list_all + "print('torch' in sys.modules)")
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_everything_public_is_there_and_nothing_else_is_promised() -> None:
    assert sorted(metarobot.__all__) == metarobot.__all__
    assert set(metarobot.__all__) <= set(dir(metarobot))
    for name in metarobot.__all__:
        assert getattr(metarobot, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = metarobot.nothing


@pytest.mark.parametrize("name", ["agents", "render"])
def test_a_package_with_a_public_name_can_be_called_once_it_is_imported(name: str) -> None:
    package = importlib.import_module(f"metarobot.{name}")
    assert getattr(metarobot, name) is package
    assert callable(package)
    assert "rl2" in metarobot.agents()


@pytest.mark.parametrize("old", NEW_PLACES)
def test_an_old_place_names_the_new_one(old: str) -> None:
    new = f"metarobot.{NEW_PLACES[old]}"
    assert importlib.util.find_spec(new) is not None
    with pytest.raises(ImportError) as error:
        importlib.import_module(f"metarobot.{old}")
    assert str(error.value) == f"metarobot.{old} is {new} now: import from there"


@pytest.mark.parametrize(
    ("statement", "new"),
    [
        ("from metarobot.env import Env", "metarobot.env.base"),
        ("from metarobot.sb3 import SB3VecEnv", "metarobot.env.sb3_vec_env"),
        ("from metarobot.checkpoint import open_run", "metarobot.training.run_folder"),
        ("from metarobot.collect import collect", "metarobot.training.collect"),
        ("from metarobot import checkpoint", "metarobot.training.run_folder"),
        ("import metarobot.bridge.gate as gate", "metarobot.bridge.safety.command_gate"),
        ("from metarobot.tasks import TaskSpace", "metarobot.tasks.space"),
        (
            "from metarobot.bridge.policy import Policy",
            "metarobot.bridge.policy.onnx_policy.OnnxPolicy",
        ),
    ],
)
def test_an_old_import_statement_names_the_new_place_in_its_last_line(
    statement: str, new: str
) -> None:
    done = python("-c", statement)
    if not done.returncode:  # the name is still there
        name = statement.split()[-1]
        assert python("-c", f"{statement}; assert {name}.__module__ == {new!r}").returncode == 0
        return
    assert re.fullmatch(rf"ImportError: .*\b{re.escape(new)}\b.*", done.stderr.splitlines()[-1])


def test_a_module_that_never_was_is_simply_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'metarobot\.nothing'"):
        importlib.import_module("metarobot.nothing")


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("stable_baselines3", {"metarobot/env/sb3_vec_env.py"}),
        ("sb3_contrib", {"agents/sb3/policies.py"}),
        ("tensorboard", {"metarobot/training/metrics_log.py"}),
        ("safetensors", {"metarobot/training/checkpoints.py"}),
    ],
)
def test_each_heavy_dependency_lives_in_one_file(package: str, homes: set[str]) -> None:
    found = set()
    for path in sources():
        for line in path.read_text().splitlines():
            if line.lstrip().startswith(("import ", "from ")) and package in line:
                found.add(shown(path))
    assert found == homes


def test_no_class_or_type_name_stands_for_two_things() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(shown(path))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                is_type_variable = "TypeVar(" in ast.unparse(node)
                if (
                    isinstance(target, ast.Name)
                    and TYPE_NAME.fullmatch(target.id)
                    and not is_type_variable
                ):
                    places[target.id].append(shown(path))
    doubled = {name: where for name, where in places.items() if len(where) > 1}
    assert not doubled


def test_lines_are_short_outside_tables_and_addresses() -> None:
    long = []
    for path in sources():
        for number, whole in enumerate(path.read_text().splitlines(), 1):
            line = whole.partition("  # noqa")[0]
            if len(line) > LINE_LENGTH and "://" not in line and "|" not in line:
                long.append(f"{shown(path)}:{number}")
    assert not long


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_bash_that_parses_and_may_be_run(script: pathlib.Path) -> None:
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


def test_gl_is_found_by_the_installer_where_it_is(gl: None) -> None:
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts" / "install_gl.sh"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
