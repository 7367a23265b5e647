import math

import mujoco
import numpy as np
import pytest

from metarobot.envs.robots import panda
from metarobot.tasks.model_edits import compile_spec

MASSES = {
    f"link{i}": m
    for i, m in enumerate((4.970684, 0.646926, 3.228604, 3.587895, 1.225946, 1.666555, 0.735522), 1)
}
MASSES |= {"hand": 0.73, "left_finger": 0.015, "right_finger": 0.015}
RANGES = [
    (-2.8973, 2.8973),
    (-1.7628, 1.7628),
    (-2.8973, 2.8973),
    (-3.0718, -0.0698),
    (-2.8973, 2.8973),
]
RANGES += [(-0.0175, 3.7525), (-2.8973, 2.8973)]
CUBE = 0.02
"""Half-size of what is put between the pads, m."""


def build(*, cube: bool = False) -> mujoco.MjModel:
    """The robot with its drives, alone in the world, or with a weightless cube between its pads."""
    spec = panda.panda()
    spec.option.timestep, spec.option.integrator = 0.005, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    if cube:
        body = spec.worldbody.add_body(name="cube", pos=[0.5, 0, 0.15], gravcomp=1)
        body.add_freejoint()
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, size=[CUBE] * 3, mass=0.2, contype=1, conaffinity=2
        )
    return compile_spec(panda.add_actuators_and_sensors(spec))


@pytest.fixture(scope="module")
def robot() -> mujoco.MjModel:
    return build()


def posed(
    model: mujoco.MjModel, joints: np.ndarray = panda.READY_POSE, opening: float = panda.MAX_OPENING
) -> mujoco.MjData:
    """At rest, with the actuators at their targets already, as they lag."""
    data = mujoco.MjData(model)
    data.qpos[:7], data.qpos[7:9] = joints, opening / 2
    data.ctrl[:7] = data.act[:7] = joints
    mujoco.mj_forward(model, data)
    return data


def drawn(number: int = 20, seed: int = 0) -> np.ndarray:
    """Joint angles, rad, ``(number, 7)``."""
    low, high = np.array(RANGES).T
    return np.random.default_rng(seed).uniform(low, high, (number, 7))


def ran(
    model: mujoco.MjModel, data: mujoco.MjData, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the tip was, m, and how far the hand was open, m, after each step."""
    tips, openings = [], []
    for _ in range(round(seconds / model.opt.timestep)):
        mujoco.mj_step(model, data)
        tips.append(data.site("tip").xpos.copy())
        openings.append(data.qpos[7:9].sum())
    assert not any(w.number for w in data.warning)
    return np.array(tips), np.array(openings)


def test_joints_and_drives_are_in_the_order_of_the_arm(robot: mujoco.MjModel) -> None:
    names = [f"joint{i}" for i in range(1, 8)]
    fingers = ["finger_joint1", "finger_joint2"]
    assert [robot.joint(i).name for i in range(robot.njnt)] == [*names, *fingers]
    assert [robot.actuator(i).name for i in range(robot.nu)] == [*names, "grip"]
    assert [robot.joint(j).name for j in robot.actuator_trnid[:7, 0]] == names
    assert (robot.nq, robot.nv, robot.na) == (9, 9, 8)


def test_it_weighs_what_the_robot_weighs(robot: mujoco.MjModel) -> None:
    assert {robot.body(i).name: robot.body_mass[i] for i in range(1, robot.nbody)} == pytest.approx(
        MASSES
    )
    assert robot.body_mass.sum() == pytest.approx(sum(MASSES.values()), abs=1e-6)


def test_limits_are_those_published(robot: mujoco.MjModel) -> None:
    assert robot.jnt_limited.all()
    assert robot.jnt_range[:7] == pytest.approx(np.array(RANGES))
    assert robot.jnt_range[7:].sum(0) == pytest.approx([0, 0.08])
    assert robot.actuator_ctrlrange[:7] == pytest.approx(np.array(RANGES))
    assert robot.actuator_forcelimited[:7].all()
    assert robot.actuator_forcerange[:7, 1].tolist() == [87.0] * 4 + [12.0] * 3
    assert (robot.actuator_forcerange[:7, 0] == -robot.actuator_forcerange[:7, 1]).all()
    assert robot.actuator_ctrlrange[7, 1] == 70
    assert panda.SPEED_LIMITS.tolist() == [2.175] * 4 + [2.61] * 3


def test_ready_is_a_hand_that_points_down_over_the_table(robot: mujoco.MjModel) -> None:
    tip = posed(robot).site("tip")
    assert tip.xpos == pytest.approx([0.5, 0, 0.15], abs=1e-3)
    assert tip.xmat.reshape(3, 3) == pytest.approx(np.diag([1, -1, -1]), abs=1e-3)
    low, high = np.array(RANGES).T
    assert np.minimum(panda.READY_POSE - low, high - panda.READY_POSE).min() > 0.3


def flange(joints: np.ndarray) -> np.ndarray:
    """Franka's own kinematics, by Craig's convention: the flange's pose ``(4, 4)``."""
    quarter, pose = math.pi / 2, np.eye(4)
    lengths, offsets = (0, 0, 0, 0.0825, -0.0825, 0, 0.088), (0.333, 0, 0.316, 0, 0.384, 0, 0)
    twists = (0, -quarter, quarter, quarter, -quarter, quarter, quarter)
    for a, d, alpha, theta in zip(lengths, offsets, twists, joints, strict=True):
        s, c, sa, ca = math.sin(theta), math.cos(theta), math.sin(alpha), math.cos(alpha)
        turned = [
            [c, -s, 0, a],
            [s * ca, c * ca, -sa, -d * sa],
            [s * sa, c * sa, ca, d * ca],
            [0, 0, 0, 1],
        ]
        pose = pose @ np.array(turned)
    pose[:3, 3] += 0.107 * pose[:3, 2]
    return pose


def test_the_flange_is_where_the_published_parameters_put_it(robot: mujoco.MjModel) -> None:
    for joints in drawn():
        hand, expected = posed(robot, joints).body("hand"), flange(joints)
        assert hand.xpos == pytest.approx(expected[:3, 3], abs=1e-9)
        turned = expected[:3, :3].T @ hand.xmat.reshape(3, 3)
        half = math.sqrt(0.5)  # the hand is mounted at 45°
        assert turned == pytest.approx(
            np.array([[half, half, 0], [-half, half, 0], [0, 0, 1]]), abs=1e-6
        )


def test_the_tip_is_in_the_middle_between_the_pads(robot: mujoco.MjModel) -> None:
    for joints in drawn(5):
        for opening in (0.0, 0.03, 0.08):
            data = posed(robot, joints, opening)
            left, right = (data.geom(f"{side}_pad").xpos for side in ("left", "right"))
            assert (left + right) / 2 == pytest.approx(data.site("tip").xpos, abs=1e-3)
            assert np.linalg.norm(left - right) == pytest.approx(
                opening + 2 * panda.PAD_HALF_SIZE[1], abs=1e-9
            )
            across = (left - right) / np.linalg.norm(left - right)
            assert across == pytest.approx(data.site("tip").xmat.reshape(3, 3)[:, 1], abs=1e-9)


def test_sensors_say_where_joints_and_tip_are_and_how_they_move(robot: mujoco.MjModel) -> None:
    rng = np.random.default_rng(1)
    for joints in drawn(5):
        data = posed(robot, joints)
        data.qvel[:] = rng.normal(size=robot.nv)
        mujoco.mj_forward(robot, data)
        sensors = np.split(data.sensordata, [21, 42, 45, 54, 57])
        assert sensors[0] == pytest.approx(data.xanchor[:7].ravel(), abs=1e-9)
        assert sensors[1] == pytest.approx(data.xaxis[:7].ravel(), abs=1e-9)
        assert sensors[2] == pytest.approx(data.site("tip").xpos, abs=1e-9)
        assert sensors[3] == pytest.approx(data.site("tip").xmat.reshape(3, 3).T.ravel(), abs=1e-9)
        before, h = data.site("tip").xpos.copy(), 1e-6
        mujoco.mj_integratePos(robot, data.qpos, data.qvel, h)
        mujoco.mj_kinematics(robot, data)
        assert sensors[4] == pytest.approx((data.site("tip").xpos - before) / h, abs=1e-4)


def test_the_arm_touches_nothing_of_its_own(robot: mujoco.MjModel) -> None:
    assert not any(
        posed(robot, joints, opening).ncon for joints in drawn(50) for opening in (0.0, 0.08)
    )


def test_gravity_is_compensated_everywhere(robot: mujoco.MjModel) -> None:
    for joints in drawn():
        data = posed(robot, joints)
        assert np.abs(data.qfrc_bias[:7]).max() > 0.1
        assert data.qacc == pytest.approx(np.zeros(robot.nv), abs=1e-6)


def test_it_holds_its_pose_for_five_seconds(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    start = data.site("tip").xpos.copy()
    tips, _ = ran(robot, data, 5)
    assert np.linalg.norm(tips - start, axis=1).max() < 1e-3


def test_it_holds_its_pose_no_matter_how_it_is_integrated(robot: mujoco.MjModel) -> None:
    model = build()
    for integrator in (
        mujoco.mjtIntegrator.mjINT_IMPLICITFAST,
        mujoco.mjtIntegrator.mjINT_IMPLICIT,
    ):
        for timestep in (0.001, 0.002, 0.005):
            model.opt.timestep, model.opt.integrator = timestep, integrator
            data = posed(model)
            start = data.site("tip").xpos.copy()
            data.qvel[:7] = 0.02  # a nudge, which must die out
            tips, _ = ran(model, data, 2)
            assert np.linalg.norm(tips[-1] - start) < 1e-4


def test_drives_that_do_not_start_where_the_arm_is_throw_it_about(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    start = data.site("tip").xpos.copy()
    data.act[:] = 0
    tips, _ = ran(robot, data, 1)
    assert np.linalg.norm(tips - start, axis=1).max() > 0.01


def test_targets_are_moved_to_with_a_lag(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    data.ctrl[:7] = panda.READY_POSE + 0.1
    for k in range(1, 41):
        mujoco.mj_step(robot, data)
        reached = 0.1 * (1 - math.exp(-k * 0.005 / panda.LAG))
        assert data.act[:7] - panda.READY_POSE == pytest.approx(np.full(7, reached), abs=1e-9)
    ran(robot, data, 2)
    assert data.qpos[:7] == pytest.approx(panda.READY_POSE + 0.1, abs=1e-3)


def test_drives_pull_with_their_gains_until_torques_saturate(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    for offset, speed in ((1e-3, 0.0), (-2e-3, 0.01), (0.0, 0.02)):
        data.act[:7], data.qvel[:7] = panda.READY_POSE + offset, speed
        mujoco.mj_forward(robot, data)
        assert data.actuator_force[:7] == pytest.approx(
            offset * panda.STIFFNESS - speed * panda.DAMPING
        )
    data.qvel[:] = 0
    for sign in (1, -1):
        data.act[:7] = panda.READY_POSE + sign * 1.0
        mujoco.mj_forward(robot, data)
        assert data.actuator_force[:7].tolist() == [sign * t for t in (87.0,) * 4 + (12.0,) * 3]


def gripped(force: float) -> mujoco.MjData:
    """Close on the cube for a second."""
    model = build(cube=True)
    data = posed(model)
    data.ctrl[7] = force
    ran(model, data, 1)
    return data


def felt(data: mujoco.MjData) -> list[float]:
    """The force on each pad, N."""
    return data.sensordata[57:59].tolist()


@pytest.mark.parametrize("force", [0.5, 2.0, 10.0, 40.0, 70.0])
def test_pads_feel_the_force_that_the_hand_is_told_to_press_with(force: float) -> None:
    data = gripped(force)
    assert felt(data) == pytest.approx([force] * 2, rel=0.05)
    assert data.body("cube").xpos == pytest.approx([0.5, 0, 0.15], abs=1e-3)


def test_the_hand_presses_with_no_more_than_it_can() -> None:
    assert felt(gripped(500.0)) == pytest.approx([70.0] * 2, rel=0.05)


def test_pads_feel_nothing_in_the_air(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    data.ctrl[7] = 1.0
    ran(robot, data, 2)
    assert felt(data) == [0.0, 0.0]


@pytest.mark.parametrize("force", [1.0, 10.0])
def test_the_width_of_what_is_held_is_felt(force: float) -> None:
    data = gripped(force)
    assert data.qpos[7:9].sum() == pytest.approx(2 * CUBE, abs=2.5e-3)


def test_a_force_of_one_newton_closes_at_the_hands_top_speed(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    data.ctrl[7] = 1.0
    ran(robot, data, 0.25)
    assert data.qvel[7:9] == pytest.approx([-0.1, -0.1], rel=0.02)


def test_fingers_move_as_one_where_one_meets_something_first() -> None:
    model = build(cube=True)
    data = posed(model)
    data.ctrl[7] = 5.0
    data.qpos[10] = 0.01
    apart = 0.0
    for _ in range(300):
        mujoco.mj_step(model, data)
        apart = max(apart, abs(data.qpos[7] - data.qpos[8]))
    assert apart < 2e-3
    assert data.body("cube").xpos[1] == pytest.approx(0, abs=1e-3), "it is pushed into the middle"


@pytest.mark.parametrize("force", [1.5, panda.MAX_GRIP_FORCE])
def test_the_hand_never_opens_wider_than_its_stroke(robot: mujoco.MjModel, force: float) -> None:
    data = posed(robot, opening=0.0)
    data.ctrl[7] = -force
    _, openings = ran(robot, data, 1.5)
    assert openings[-1] > panda.MAX_OPENING - 1e-3
    assert openings.max() < panda.MAX_OPENING + 1.5e-3


def test_the_hand_closes_no_further_than_shut(robot: mujoco.MjModel) -> None:
    data = posed(robot)
    data.ctrl[7] = 0.7
    _, openings = ran(robot, data, 1.5)
    assert openings[-1] == pytest.approx(0, abs=1e-3)
    assert openings.min() > -2.5e-3
