import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {"metarobot", "metarobot.envs", "metarobot.agents"}
    found |= {f"metarobot.{p.parent.name}" for p in (ROOT / "metarobot").glob("*/__init__.py")}
    assert listed == found


def test_links_lead_to_the_real_folders() -> None:
    for name in ("envs", "agents"):
        link = ROOT / "metarobot" / name
        assert link.is_symlink()
        assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_the_bare_name_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert f"import metarobot.{name}, not {name}" in done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import metarobot, sys; print(sorted({'torch', 'mujoco', 'stable_baselines3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("stable_baselines3", "sb3.py"),
        ("sb3_contrib", "sb3_policies.py"),
        ("tensorboard", "log.py"),
        ("safetensors", "checkpoint.py"),
    ],
)
def test_each_heavy_dependency_lives_in_one_file(package: str, home: str) -> None:
    files = [p for folder in ("metarobot", "envs", "agents") for p in (ROOT / folder).rglob("*.py")]
    homes = {p.name for p in files if any(
        line.lstrip().startswith(("import ", "from ")) and package in line for line in p.read_text().splitlines()
    )}  # fmt: skip
    assert homes == {home}


def test_files_and_functions_stay_short() -> None:
    import ast

    for folder in ("metarobot", "envs", "agents"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert len(text.splitlines()) <= 400, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


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
