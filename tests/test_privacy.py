"""What leaves the machine holds no absolute path, host or user name."""

import json
import platform
import socket
import zipfile
from pathlib import Path

import pytest
from helpers import run as command
from helpers import tiny_run

from metarobot.files import read_json
from metarobot.privacy import public_settings, without_folders
from metarobot.training.run_files import write_sealed
from metarobot.training.run_folder import open_run

USER = "alice-of-secrets"
HOST = "host-nobody-knows"
SECRETS = (USER, HOST, "private-project")


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("metarobot train X --out /home/a/runs/x", "metarobot train X --out x"),
        ("train --robot=/home/a/b.xml --demos '/d e/f'", "train --robot=b.xml --demos 'd e/f'"),
        ("no run folder '/home/a/x', and", "no run folder 'x', and"),
        ("--out ~/runs/x --steps 3/4 runs/y ./z ../w", "--out x --steps 3/4 runs/y ./z ../w"),
        ("a https://example.org/x", "a https://example.org/x"),
        (r"C:\Users\a\x", "x"),
    ],
)
def test_paths_from_the_root_are_their_last_name(text: str, public: str) -> None:
    assert without_folders(text) == public


def test_paths_among_settings_are_their_last_name() -> None:
    settings = {"robot": "/home/a/b.xml", "demos": "demos/c", "steps": 3, "other": "/x/y"}
    public = {"robot": "b.xml", "demos": "demos/c", "steps": 3, "other": "/x/y"}
    assert public_settings(settings, ("robot", "demos", "init")) == public
    assert public_settings({"robot": "menagerie:panda"}, ("robot",)) == {"robot": "menagerie:panda"}


def holders(folder: Path) -> list[str]:
    """Return which files hold one of the planted names, in their names or in their bytes."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        contents = [path.read_bytes(), str(path.relative_to(folder)).encode()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        if any(secret.encode() in content for secret in SECRETS for content in contents):
            found.append(str(path.relative_to(folder)))
    return found


def test_nothing_that_is_written_names_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / USER
    work = home / "private-project"
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    monkeypatch.chdir(tmp_path)

    trained = tiny_run(work / "trained", steps=800)
    # A robot and demonstrations of one's own stand in the run with their absolute paths
    demos = {"demos": str(work / "demos")}
    write_sealed(
        trained.folder / "config.json", {**read_json(trained.folder / "config.json"), **demos}
    )
    out = work / "out"
    for words in (
        ("export", str(trained.folder), "--out", str(out / "policy"), "--tasks", "1"),
        ("evaluate", str(trained.folder), "--tasks", "2", "--json", str(out / "report.json")),
        (
            *("publish", str(trained.folder), "--out", str(out / "published")),
            *("--summary", f"made by hand in {work}/lab", "--report", str(out / "report.json")),
            *("--command", f"metarobot train CheetahDir100 --out {work}/trained --demos ~/x"),
        ),
    ):
        code, _, errors = command(capsys, *words)
        assert code == 0, errors

    words = ["run", str(out / "policy"), "--set", "lockstep=true", "--trials", "1", "--plain"]
    code, _, errors = command(capsys, *words, "--log", str(out / "run.mcap"))
    assert code == 0, errors

    names = {p.name for p in out.rglob("*") if p.is_file()}
    assert {"policy.json", "policy.onnx", "report.json", "card.json", "run.mcap"} <= names
    assert holders(out) == []
    assert json.loads((out / "published" / "config.json").read_text())["demos"] == "demos"
    assert open_run(out / "published").load_agent() is not None
    # The search itself finds what is there, in the run folder, which stays on this machine:
    # settings with paths, and TensorBoard's files, which have the host's name in theirs
    found = holders(work / "trained")
    assert {name for name in found if not name.startswith("events.")} == {"config.json"}
