"""Model files from strangers: what ``--robot`` refuses, in one line and in time."""

import os
from collections.abc import Callable
from pathlib import Path

import mujoco
import pytest
from model_fuzzing import fuzz_models

from metarobot.cli.main import main
from metarobot.envs.robots import model_check, model_files, panda
from metarobot.tasks.model_edits import ModelError

TETRAHEDRON = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 3 1 4\n"
BODY = '<worldbody><body><freejoint/><geom type="mesh" mesh="m" mass="1"/></body></worldbody>'
BALL = '<worldbody><body><freejoint/><geom size="0.1" {}/></body></worldbody>'


def read(path: Path) -> mujoco.MjModel:
    return model_files.read_model(str(path), "arm", "panda").compile()


def written(folder: Path, text: str, name: str = "robot.xml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def robot(folder: Path, inside: str) -> Path:
    return written(folder, f"<mujoco>{inside}</mujoco>")


def refusal(path: Path) -> str:
    """Return the line with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        read(path)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    assert path.name in line
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A robot's folder, with a mesh in ``assets/``, and a mesh outside of it."""
    written(tmp_path, TETRAHEDRON, "outside.obj")
    written(tmp_path / "robot" / "assets", TETRAHEDRON, "m.obj")
    return tmp_path / "robot"


def mesh(file: str, directory: str = "assets") -> str:
    return f'<compiler meshdir="{directory}"/><asset><mesh name="m" file="{file}"/></asset>{BODY}'


def test_a_model_with_its_meshes_and_includes_beside_it_loads_as_ever(folder: Path) -> None:
    written(folder / "parts", f"<mujoco>{mesh('m.obj')}</mujoco>", "body.xml")
    path = robot(folder, '<include file="parts/body.xml"/>')
    assert read(path).nmesh == 1
    here = os.path.relpath(path)
    assert model_files.read_model(here, "arm", "panda").compile().nmesh == 1


@pytest.mark.parametrize("directory", ["assets", "./assets/", "assets/../assets"])
def test_directories_of_meshes_within_the_folder(folder: Path, directory: str) -> None:
    assert read(robot(folder, mesh("m.obj", directory))).nmesh == 1


def test_files_outside_the_folder_are_refused_unless_allowed_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = folder.parent
    (folder / "assets" / "link.obj").symlink_to(outside / "outside.obj")
    (folder / "linked").symlink_to(outside)
    path = folder / "robot.xml"
    texts = [
        mesh("../outside.obj", ""),
        mesh("outside.obj", ".."),
        mesh("../../outside.obj"),
        mesh(str(outside / "outside.obj")),
        mesh("outside.obj", str(outside)),
        mesh("link.obj"),
        mesh("outside.obj", "linked"),
    ]
    for text in texts:
        robot(folder, text)
        monkeypatch.delenv(model_check.FOLDERS_VARIABLE, raising=False)
        assert "outside its folder" in refusal(path), text
        monkeypatch.setenv(model_check.FOLDERS_VARIABLE, str(outside))
        assert read(path).nmesh == 1, text


@pytest.mark.parametrize(
    "inside",
    [
        '<include file="../outside.obj"/>',
        '<asset><model name="a" file="../outside.obj"/></asset>',
        '<asset><texture type="cube" name="t" fileup="../outside.obj"/></asset>',
        '<asset><texture type="2d" name="t" file="../outside.obj"/></asset>',
        '<asset><hfield name="h" file="../outside.obj" size="1 1 1 1"/></asset>',
        '<asset><skin name="s" file="../outside.obj"/></asset>',
        '<deformable><skin name="s" file="../outside.obj"/></deformable>',
        '<worldbody><flexcomp name="f" type="mesh" file="../outside.obj"/></worldbody>',
        '<include file="/etc/passwd"/>',
    ],
)
def test_every_element_that_names_a_file(folder: Path, inside: str) -> None:
    assert "outside its folder" in refusal(robot(folder, inside))
    # the same in a file that is included
    written(folder, f"<mujoco>{inside}</mujoco>", "part.xml")
    assert "outside its folder" in refusal(robot(folder, '<include file="part.xml"/>'))


@pytest.mark.parametrize(
    "inside",
    [
        '<extension><plugin plugin="mujoco.sdf.torus"/></extension>',
        '<worldbody><body><plugin plugin="a.b"/></body></worldbody>',
    ],
)
def test_plugins_are_not_loaded(folder: Path, inside: str) -> None:
    assert "plugins are not loaded" in refusal(robot(folder, inside))


@pytest.mark.parametrize("special", ["fifo", "device"])
def test_only_regular_files_are_opened(folder: Path, special: str) -> None:
    place = folder / "assets" / "odd.obj"
    if special == "fifo":
        os.mkfifo(place)
        assert "no regular file" in refusal(robot(folder, mesh("odd.obj")))
    else:
        place.symlink_to("/dev/zero")
        assert "outside its folder" in refusal(robot(folder, mesh("odd.obj")))


def test_a_robot_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "robot.xml")
    for path in (tmp_path / "robot.xml", Path("/dev/zero"), tmp_path):
        with pytest.raises(ModelError, match="no robot model"):
            read(path)


def test_large_files_are_refused(folder: Path) -> None:
    path = robot(folder, mesh("m.obj"))
    os.truncate(folder / "assets" / "m.obj", model_check.MAX_FILE_BYTES + 1)
    assert "bytes, more than" in refusal(path)
    os.truncate(path, model_check.MAX_XML_BYTES + 1)
    assert "bytes, more than" in refusal(path)


LAUGHS = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))
NO_XML = {
    "entity expansion": (
        f'<!DOCTYPE m [<!ENTITY a0 "ha">{LAUGHS}]><mujoco model="&a9;"/>',
        "document type",
    ),
    "external entity": (
        '<!DOCTYPE m [<!ENTITY a SYSTEM "/etc/passwd">]><mujoco model="&a;"/>',
        "document type",
    ),
    "deep": ("<mujoco>" + "<worldbody>" * 100_000, "nested more than 100 deep"),
    "no XML": ("hello", "is no XML"),
    "empty": ("", "is no XML"),
    "cut off": ("<mujoco><worldbody>", "is no XML"),
    "zeros": ("\0" * 100, "is no XML"),
    "a scheme": (f"<mujoco>{mesh('http://a/b.obj')}</mujoco>", "no plain path"),
    "line break in a name": (f"<mujoco>{mesh('a&#10;b.obj')}</mujoco>", "no plain path"),
}


@pytest.mark.parametrize("case", NO_XML)
def test_what_is_no_plain_xml_is_refused_at_once(tmp_path: Path, case: str) -> None:
    text, message = NO_XML[case]
    assert message in refusal(written(tmp_path, text))


def test_an_endless_circle_of_includes_is_refused(tmp_path: Path) -> None:
    written(tmp_path, '<mujoco><include file="robot.xml"/></mujoco>', "b.xml")
    assert "already included" in refusal(robot(tmp_path, '<include file="b.xml"/>'))


ABSURD = {
    "negative mass": (BALL.format('mass="-1"'), "negative"),
    "nan": (BALL.format('pos="nan 0 0" mass="nan"'), "include NaN"),
    "1e300": (BALL.format('mass="1e300"'), "its body_mass has numbers"),
    "1e999": (BALL.format('mass="1e999"'), "too large"),
    "infinite": ('<worldbody><body pos="inf 0 0"/></worldbody>', "its body_pos has numbers"),
    "sensor of 1e9": (
        '<worldbody><site name="s"/></worldbody>'
        '<sensor><contact site="s" num="1000000000"/></sensor>',
        "allocate",
    ),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_numbers_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    inside, message = ABSURD[case]
    assert message in refusal(robot(tmp_path, inside))


def test_models_that_compile_but_are_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = (
        '<worldbody><replicate count="50"><body><geom size="1"/></body></replicate></worldbody>'
    )
    path = robot(tmp_path, inside)
    monkeypatch.setitem(model_check.MAX_SIZES, "nbody", 20)
    assert "it is too large: nbody is 51, the most is 20" in refusal(path)
    monkeypatch.setitem(model_check.MAX_SIZES, "nbody", 51)
    assert read(path).nbody == 51


HANGS = {
    "a billion bodies": '<worldbody><replicate count="1000000000"><body/></replicate></worldbody>',
    "a cloth of 3000³": '<worldbody><flexcomp name="f" type="grid" dim="3" count="3000 3000 3000" '
    'spacing="1 1 1"/></worldbody>',
    "100 million key frames": BALL.format("") + '<size nkey="100000000"/>',
}


@pytest.mark.parametrize("case", HANGS)
@pytest.mark.slow
def test_what_makes_mujoco_hang_is_ended(tmp_path: Path, case: str) -> None:
    assert "MuJoCo" in refusal(robot(tmp_path, HANGS[case]))


def test_a_child_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "TRIAL_WALL_S", 1.0)
    assert "takes more than 1 s" in refusal(robot(tmp_path, HANGS["a billion bodies"]))


def test_the_command_line_says_it_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = robot(folder, mesh("../outside.obj", ""))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "QuadrupedMix-rl2", "--tasks", "1", "--robot", str(path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "outside its folder" in error
    assert "Traceback" not in error


def test_damaged_model_files_are_refused_in_one_line(tmp_path: Path) -> None:
    text = panda.panda().to_xml().encode()
    happened, broken = fuzz_models(text, tmp_path, 300, seed=0, child_share=0.01)
    assert happened["refused"] + happened["accepted"] == 300
    assert not broken


def test_a_model_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = robot(tmp_path, BALL.format(""))
    read(path)
    children: list[Path] = []
    run: Callable[[Path], dict[str, int]] = model_check._sizes_in_child

    def counted(file: Path) -> dict[str, int]:
        children.append(file)
        return run(file)

    monkeypatch.setattr(model_check, "_sizes_in_child", counted)
    read(path)
    assert not children
    robot(tmp_path, BALL.format('mass="3"'))
    read(path)
    assert len(children) == 1
