import math
import os
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from helpers import written

from metarobot.env.base import Env
from metarobot.envs.robots import go2
from metarobot.tasks.family import Family, family_on
from metarobot.tasks.model_edits import ModelError, compile_spec

BODIES = [(leg, part) for leg in ("FL", "RL") for part in go2.LEG_PARTS]
MIRROR = np.diag([1.0, -1.0, 1.0])
MESHES = os.environ.get("METAROBOT_GO2_MJCF", "")


@pytest.fixture(scope="module")
def robot() -> mujoco.MjModel:
    return compile_spec(go2.go2())


def stood(
    model: mujoco.MjModel, seconds: float, action: float = 0.0
) -> tuple[mujoco.MjData, np.ndarray]:
    """Let a robot stand from its default pose; its trunk's height over time, m."""
    data = mujoco.MjData(model)
    data.qpos[:7], data.ctrl[:] = [0, 0, go2.STANDING_HEIGHT + 0.02, 1, 0, 0, 0], action
    for name, angle in zip(joints(model), go2.DEFAULT_POSE, strict=True):
        data.joint(name).qpos[0] = angle
    heights = []
    for _ in range(round(seconds / model.opt.timestep)):
        mujoco.mj_step(model, data)
        heights.append(data.qpos[2])
    mujoco.mj_forward(model, data)
    return data, np.array(heights)


def joints(model: mujoco.MjModel) -> list[str]:
    """Names of the joints that the drives move, in the order of the drives."""
    return [model.joint(j).name for j in model.actuator_trnid[:, 0]]


def upright(data: mujoco.MjData) -> float:
    """Cosine of the trunk's tilt."""
    return float(1 - 2 * np.square(data.qpos[4:6]).sum())


def pose(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    return np.array([data.joint(name).qpos[0] for name in joints(model)])


def test_joints_and_drives_are_in_the_order_of_the_robots_own_motors(robot: mujoco.MjModel) -> None:
    names = [
        f"{leg}_{part}" for leg in ("FR", "FL", "RR", "RL") for part in ("hip", "thigh", "calf")
    ]
    assert list(go2.JOINTS) == names
    assert [robot.actuator(i).name for i in range(robot.nu)] == names
    assert joints(robot) == [f"{n}_joint" for n in names]
    assert [robot.joint(f"{n}_joint").qposadr[0] for n in names] == list(range(7, 19))
    assert [robot.joint(f"{n}_joint").dofadr[0] for n in names] == list(range(6, 18))


def test_limits_are_those_published(robot: mujoco.MjModel) -> None:
    assert robot.actuator_forcerange[:, 1].tolist() == [23.7, 23.7, 45.43] * 4
    assert (robot.actuator_forcerange[:, 0] == -robot.actuator_forcerange[:, 1]).all()
    assert go2.SPEED_LIMITS.tolist() == [30.1, 30.1, 15.70] * 4
    for leg in go2.LEGS:
        ranges = [robot.joint(f"{leg}_{part}_joint").range.tolist() for part in go2.LEG_PARTS]
        thigh = [-1.5708, 3.4907] if leg[0] == "F" else [-0.5236, 4.5379]
        assert ranges == [[-1.0472, 1.0472], thigh, [-2.7227, -0.83776]]
    assert robot.jnt_limited[1:].all()
    assert (robot.jnt_range[1:, 0] < go2.DEFAULT_POSE).all()
    assert (robot.jnt_range[1:, 1] > go2.DEFAULT_POSE).all()


def test_it_weighs_what_the_robot_weighs(robot: mujoco.MjModel) -> None:
    assert robot.body_mass.sum() == pytest.approx(15.2, rel=0.02)
    assert robot.body_mass.sum() - robot.body("payload").mass[0] == pytest.approx(
        go2.TOTAL_MASS, abs=0.01
    )
    assert robot.body("payload").mass[0] == pytest.approx(1e-3)


def inertia(model: mujoco.MjModel, body: str) -> np.ndarray:
    """Inertia about the centre of mass in the body's own axes."""
    turn = np.zeros(9)
    mujoco.mju_quat2Mat(turn, model.body(body).iquat)
    axes = turn.reshape(3, 3)
    return axes @ np.diag(model.body(body).inertia) @ axes.T


@pytest.mark.parametrize(("leg", "part"), BODIES)
def test_right_legs_mirror_left_ones(robot: mujoco.MjModel, leg: str, part: str) -> None:
    left, right = f"{leg}_{part}", f"{leg[0]}R_{part}"
    assert robot.body(left).mass[0] == robot.body(right).mass[0]
    assert robot.body(right).ipos == pytest.approx(MIRROR @ robot.body(left).ipos)
    assert robot.body(right).pos == pytest.approx(MIRROR @ robot.body(left).pos)
    assert inertia(robot, right) == pytest.approx(MIRROR @ inertia(robot, left) @ MIRROR, abs=1e-7)


def test_the_mass_matrix_is_mirrored_but_for_the_trunks_own_asymmetry(
    robot: mujoco.MjModel,
) -> None:
    data, full = mujoco.MjData(robot), []
    swap = [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    sign = np.array([-1.0, 1.0, 1.0] * 4)
    legs = go2.DEFAULT_POSE + np.random.default_rng(0).uniform(-0.5, 0.5, 12)
    for q in (legs, (sign * legs)[swap]):
        data.qpos[3:7], data.qpos[7:] = [1, 0, 0, 0], q
        mujoco.mj_forward(robot, data)
        matrix = np.zeros((robot.nv, robot.nv))
        mujoco.mj_fullM(robot, data, matrix)
        full.append(matrix)
        assert data.subtree_com[0][1] == pytest.approx(0, abs=0.02)
    order = np.array([0, 1, 2, 3, 4, 5, *(6 + np.array(swap))])
    signs = np.array([1, -1, 1, -1, 1, -1, *sign])
    mirrored = (signs[:, None] * full[0] * signs)[np.ix_(order, order)]
    trunk = 2 * abs(inertia(robot, "base")[1, [0, 2]]).max()
    assert abs(mirrored - full[1]).max() == pytest.approx(trunk, rel=1e-3)
    assert trunk < 1e-3


def test_the_default_pose_has_its_centre_of_mass_in_the_middle(robot: mujoco.MjModel) -> None:
    data = mujoco.MjData(robot)
    data.qpos[3], data.qpos[7:] = 1, go2.DEFAULT_POSE
    mujoco.mj_forward(robot, data)
    assert data.subtree_com[0][1] - data.qpos[1] == pytest.approx(0, abs=1e-6)
    feet = np.stack([data.site(f"{leg}_foot").xpos for leg in go2.LEGS])
    assert feet[:, 0].min() < data.subtree_com[0][0] < feet[:, 0].max()


def test_it_stands_at_its_height_and_does_not_sink(robot: mujoco.MjModel) -> None:
    _, heights = stood(robot, 10)
    settled = heights[200:]
    assert heights[200] == pytest.approx(go2.STANDING_HEIGHT, abs=0.01)
    assert np.ptp(settled) < 0.01


def test_it_holds_the_default_pose_for_ten_seconds(robot: mujoco.MjModel) -> None:
    data, _ = stood(robot, 10)
    assert upright(data) > math.cos(math.radians(5))
    assert abs(pose(robot, data) - go2.DEFAULT_POSE).max() < 0.3
    assert abs(data.qvel).max() < 0.1
    assert np.hypot(*data.qpos[:2]) < 0.1
    forces = [data.sensor(f"{leg}_touch").data[0] for leg in go2.LEGS]
    assert sum(forces) == pytest.approx(robot.body_mass.sum() * 9.81, rel=0.02)


def held(robot: mujoco.MjModel, offset: float, velocity: float = 0.0) -> mujoco.MjData:
    data = mujoco.MjData(robot)
    data.qpos[:7], data.qpos[7:], data.qvel[6:] = (
        [0, 0, 2, 1, 0, 0, 0],
        go2.DEFAULT_POSE + offset,
        velocity,
    )
    mujoco.mj_forward(robot, data)
    return data


def test_drives_pull_towards_the_pose_with_their_gains(robot: mujoco.MjModel) -> None:
    assert held(robot, 0.0).actuator_force == pytest.approx(np.zeros(12))
    assert held(robot, 0.2).actuator_force == pytest.approx(np.full(12, -0.2 * go2.STIFFNESS))
    assert held(robot, -0.1, 3.0).actuator_force == pytest.approx(
        np.full(12, 0.1 * go2.STIFFNESS - 3.0 * go2.DAMPING)
    )


def test_torques_saturate(robot: mujoco.MjModel) -> None:
    for offset in (3.0, -3.0, 100.0):
        assert held(robot, offset).actuator_force == pytest.approx(
            -np.sign(offset) * go2.TORQUE_LIMITS
        )


def response(steps: int, delay: float, at: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What reaches the drives, and their torques, in the steps after a step of the action to 1,
    held in the air."""
    spec = go2.go2()
    for name in go2.JOINTS:
        spec.actuator(name).delay = delay
    model = compile_spec(spec)
    data, reached, torque = held(model, 0.0), [], []
    for step in range(at + steps):
        data.qpos[:7], data.qpos[7:], data.qvel[:] = [0, 0, 2, 1, 0, 0, 0], go2.DEFAULT_POSE, 0
        data.ctrl[:] = step >= at
        mujoco.mj_step(model, data)
        reached.append(data.act.copy())
        torque.append(data.actuator_force.copy())
    return np.array(reached[at:]), np.array(torque[at:])


@pytest.mark.parametrize("at", [0, 37])
@pytest.mark.parametrize(
    ("delay", "late"), [(go2.LATENCY, 1), (0.0125, 3), (0.0199, 4), (go2.MAX_LATENCY, 8)]
)
def test_an_action_arrives_late_and_lags(delay: float, late: int, at: int) -> None:
    reached, torque = response(20, delay, at)
    since = np.maximum(np.arange(1, 21) - late, 0) * go2.TIMESTEP
    assert reached == pytest.approx(np.tile(1 - np.exp(-since / go2.LAG), (12, 1)).T, abs=1e-6)
    force = (
        go2.STIFFNESS
        * go2.ACTION_SCALE
        * (1 - np.exp(-np.maximum(since - go2.TIMESTEP, 0) / go2.LAG))
    )
    assert torque == pytest.approx(np.tile(force, (12, 1)).T, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_delay_of_whole_steps_is_the_same_at_all_times(steps: int) -> None:
    spec = go2.go2()
    for name in go2.JOINTS:
        spec.actuator(name).delay = steps * go2.TIMESTEP
    model = compile_spec(spec)
    data, sent = mujoco.MjData(model), np.random.default_rng(0).uniform(-1, 1, 800)
    data.qpos[:4], data.qpos[7:] = [0, 0, 2, 1], go2.DEFAULT_POSE
    for step, action in enumerate(sent):
        before, data.ctrl[:] = data.act[0], action
        mujoco.mj_step(model, data)
        arrived = before + (data.act[0] - before) / (1 - math.exp(-go2.TIMESTEP / go2.LAG))
        assert arrived == pytest.approx(sent[step - steps] if step >= steps else 0.0, abs=1e-6), (
            step
        )


def bare() -> ET.Element:
    """Our robot as somebody else would publish it: with its own floor and drives, without what we
    add to a robot."""
    spec = go2.go2()
    for thing in (*spec.sensors, *spec.sites, spec.body("payload")):
        spec.delete(thing)
    return ET.fromstring(spec.to_xml())


SHORT = {f"{j}_joint": j for j in go2.JOINTS}
NAMINGS = {
    "joints as ours": {},
    "joints without _joint": SHORT,
    "feet with _foot": {n: f"{n}_foot" for n in go2.LEGS},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_another_model_is_driven_as_ours(
    tmp_path: Path, robot: mujoco.MjModel, naming: str
) -> None:
    model = compile_spec(go2.load(written(tmp_path / "robot.xml", bare(), **NAMINGS[naming])))
    assert (model.nq, model.nv, model.nu, model.na) == (robot.nq, robot.nv, robot.nu, robot.na)
    assert [j.removesuffix("_joint") for j in joints(model)] == list(go2.JOINTS)
    assert model.jnt_qposadr[model.actuator_trnid[:, 0]].tolist() == list(range(7, 19))
    assert [model.sensor(i).name for i in range(model.nsensor)] == [
        robot.sensor(i).name for i in range(robot.nsensor)
    ]
    assert [model.actuator(i).name for i in range(model.nu)] == list(go2.JOINTS)
    for field in (
        "actuator_gainprm",
        "actuator_biasprm",
        "actuator_forcerange",
        "actuator_delay",
        "body_mass",
    ):
        assert getattr(model, field) == pytest.approx(getattr(robot, field))
    ours, theirs = stood(robot, 2), stood(model, 2)
    assert theirs[1] == pytest.approx(ours[1], abs=1e-9)
    assert theirs[0].sensordata == pytest.approx(ours[0].sensordata, abs=1e-6)


def test_legs_may_come_in_any_order(tmp_path: Path, robot: mujoco.MjModel) -> None:
    root = bare()
    trunk = root.find("worldbody/body")
    legs = trunk.findall("body")
    for leg, place in zip(legs, (1, 0, 3, 2), strict=True):
        trunk.remove(leg)
        trunk.append(legs[place])
    path = written(tmp_path / "robot.xml", root)
    model = compile_spec(go2.load(path))
    assert joints(model) == joints(robot)
    assert [model.joint(i).name for i in range(1, 13)] != joints(robot)
    assert stood(model, 1)[1] == pytest.approx(stood(robot, 1)[1], abs=1e-6)
    ours, theirs = small(family_on("QuadrupedFlat")), small(family_on("QuadrupedFlat", path))
    rng = torch.Generator().manual_seed(0)
    action = torch.randn(
        2, 12, generator=rng
    )  # one step: contacts in another order soon lead elsewhere
    x, y = (e.step(action) for e in (ours, theirs))
    assert torch.allclose(x.obs, y.obs, atol=1e-3), "joint angles are observed in their order"
    assert all(torch.allclose(x.terms[k], y.terms[k], atol=1e-3) for k in x.terms)


def test_our_own_model_written_to_a_file_is_read_back(
    tmp_path: Path, robot: mujoco.MjModel
) -> None:
    path = tmp_path / "ours.xml"
    path.write_text(go2.go2().to_xml())
    model = compile_spec(go2.load(str(path)))
    assert stood(model, 1)[1] == pytest.approx(stood(robot, 1)[1], abs=1e-6)


def small(family: Family) -> Env:
    return Env(family, family.space.sample("train", 2), threads=1)


def test_a_family_runs_on_another_robot(tmp_path: Path) -> None:
    path = written(tmp_path / "robot.xml", bare(), **SHORT)
    for name in ("QuadrupedFlat", "QuadrupedMix"):
        ours, theirs = family_on(name), family_on(name, path)
        assert theirs.space == ours.space
        a, b = small(ours), small(theirs)
        for _ in range(10):
            x, y = (e.step(torch.zeros(2, 12)) for e in (a, b))
        assert torch.allclose(x.obs, y.obs, atol=1e-4)


def slid(root: ET.Element) -> None:
    next(j for j in root.iter("joint") if j.get("name") == "FL_calf_joint").set("type", "slide")


def tied(root: ET.Element) -> None:
    trunk = root.find("worldbody/body")
    trunk.remove(next(j for j in trunk if j.tag in ("freejoint", "joint")))


@pytest.mark.parametrize(
    ("change", "renamed", "message"),
    [
        (tied, {}, " needs one body on a free joint, the trunk; it has 0"),
        (slid, {}, ": joint 'FL_calf_joint' is no hinge"),
        (
            None,
            {"FR_hip_joint": "a", "RL_calf_joint": "b"},
            " lacks the joints FR_hip_joint, RL_calf_joint; it has: ",
        ),
        (None, {"RR": "a"}, " lacks the foot geoms RR; it has: "),
    ],
)
def test_a_model_that_is_no_such_robot_is_told_what_it_lacks(
    tmp_path: Path, change, renamed, message: str
) -> None:
    root = bare()
    if change:
        change(root)
    path = written(tmp_path / "robot.xml", root, **renamed)
    with pytest.raises(ModelError) as error:
        go2.load(path)
    assert str(error.value).startswith(path + message)
    assert "\n" not in str(error.value)
    if renamed:
        there = str(error.value).split("it has: ")[1].split(", ")
        assert set(renamed.values()) <= set(there)
        assert not set(renamed) & set(there)


@pytest.mark.parametrize(
    "text",
    ["", "not xml", "<mujoco><worldbody>", "<robot name='urdf'/>", "<mujoco><mjcf/></mujoco>"],
)
def test_a_file_that_is_no_mjcf_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "robot.xml"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"^[^\n]*robot.xml [^\n]+$"):
        go2.load(str(path))


@pytest.mark.parametrize("name", ["nowhere.xml", ""])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ModelError,
        match=r"^no robot model .*: give a path to an MJCF file, or menagerie:unitree_go2$",
    ):
        go2.load(str(tmp_path / name))


@pytest.mark.skipif(
    find_spec("mujoco_menagerie") is not None, reason="mujoco-menagerie is installed"
)
def test_menagerie_without_its_package_names_the_command_that_installs_it() -> None:
    with pytest.raises(
        ModelError,
        match=r"^menagerie:unitree_go2 needs a package: pip install 'metarobot\[menagerie\]'$",
    ):
        go2.load("menagerie:unitree_go2")


@pytest.mark.skipif(not MESHES, reason="METAROBOT_GO2_MJCF names no model of a Go2")
def test_a_published_model_with_meshes_holds_the_pose() -> None:
    data, heights = stood(model := compile_spec(go2.load(MESHES)), 5)
    assert model.body_mass.sum() == pytest.approx(go2.TOTAL_MASS, rel=0.05)
    assert upright(data) > math.cos(math.radians(5))
    assert abs(pose(model, data) - go2.DEFAULT_POSE).max() < 0.3
    assert heights[-1] == pytest.approx(go2.STANDING_HEIGHT, abs=0.03)
    ours, theirs = (small(family_on("QuadrupedFlat", robot)) for robot in ("", MESHES))
    for _ in range(199):
        a, b = (env.step(torch.zeros(2, 12)) for env in (ours, theirs))
        assert not b.terminated.any()
    assert torch.allclose(a.obs[:, 6:18], b.obs[:, 6:18], atol=0.15), (
        "the same joints, in the same order"
    )
