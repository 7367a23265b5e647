import math
from dataclasses import replace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from metarobot.env.base import Env
from metarobot.envs.robots.model_files import read_gymnasium_model
from metarobot.tasks.distributions import TaskError
from metarobot.tasks.family import Family, WorldState, families
from metarobot.tasks.model_edits import ModelFactory
from metarobot.tasks.task_models import TaskModels

THEIRS = {
    "AntDir": "Ant-v5",
    "AntGoal": "Ant-v5",
    "HumanoidDir": "Humanoid-v5",
    "WalkerParams": "Walker2d-v5",
    "HopperParams": "Hopper-v5",
}
PLANAR = ("WalkerParams", "HopperParams")
SCALED = [(name, p.name) for name in PLANAR for p in families.get(name).space.params]
FIELDS = {
    "mass": "body_mass",
    "inertia": "body_inertia",
    "damping": "dof_damping",
    "friction": "geom_friction",
}
DERIVED = {
    "actuator_acc0",
    "body_invweight0",
    "body_subtreemass",
    "cam_poscom0",
    "dof_M0",
    "dof_invweight0",
}


def nominal(family: Family) -> dict[str, float]:
    """Factors of one; for the ant and the humanoid x as the direction, and the edge of the disc
    along x as the goal."""
    return {
        p.name: float(family.name in PLANAR or p.name == "goal_area") for p in family.space.params
    }


def state(qpos, qvel=(0.0,), action=(0.0,), sensors=(0.0, 0.0, 0.0), **task: float) -> WorldState:
    """One world."""
    rows = (torch.tensor([x], dtype=torch.float64) for x in (qpos, qvel, sensors, action))
    return WorldState(*rows, {k: torch.tensor([v], dtype=torch.float64) for k, v in task.items()})


def arrays(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    fields = {k: getattr(model, k) for k in dir(model) if not k.startswith("_")}
    return {k: v.copy() for k, v in fields.items() if isinstance(v, np.ndarray)}


def differences(a: mujoco.MjModel, b: mujoco.MjModel) -> set[str]:
    a, b = arrays(a), arrays(b)
    return {k for k in a if not np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f")}


@pytest.mark.parametrize("name", THEIRS)
def test_the_nominal_robot_moves_sees_and_earns_as_gymnasiums(name: str) -> None:
    family = families.get(name)
    env = Env(family.replace(terminate=None), [nominal(family)], threads=1)
    theirs = gymnasium.make(THEIRS[name]).unwrapped
    theirs.reset(seed=0)
    env.reset(4)
    theirs.set_state(env.state.qpos[0].numpy().copy(), env.state.qvel[0].numpy().copy())
    assert env.dt == pytest.approx(theirs.dt)
    rng, reach = np.random.default_rng(0), theirs.model.actuator_ctrlrange[0, 1]
    x = theirs.data.qpos[0]
    for _ in range(50):
        action = rng.uniform(-1, 1, env.act_dim)
        step = env.step(torch.from_numpy(action)[None])
        obs, _, terminated, _, info = theirs.step(reach * action)
        assert env.state.qpos[0].numpy() == pytest.approx(theirs.data.qpos, abs=1e-9)
        assert env.state.qvel[0].numpy() == pytest.approx(theirs.data.qvel, abs=1e-9)
        if name == "AntGoal":
            assert step.obs[0, :2].numpy() == pytest.approx(theirs.data.qpos[:2], abs=1e-5)
            assert step.obs[0, 2:].numpy() == pytest.approx(obs[:27], abs=1e-5)
            continue
        assert step.obs[0].numpy() == pytest.approx(obs[: env.obs_dim], abs=1e-5)
        assert family.interaction.terminate(env.state)[0] == terminated
        paid = {k: family.weights[k] * float(v[0]) for k, v in step.terms.items()}
        assert paid["control"] == pytest.approx(info["reward_ctrl"], abs=1e-9)
        assert terminated or paid["alive"] == info["reward_survive"]
        if name in PLANAR:
            assert paid["speed"] == pytest.approx(info["reward_forward"], abs=1e-9)
        elif (
            name == "AntDir"
        ):  # Gymnasium's comes from body positions, which are a little older than the joints'
            assert paid["speed"] == pytest.approx((theirs.data.qpos[0] - x) / theirs.dt, abs=1e-9)
            assert paid["speed"] == pytest.approx(info["reward_forward"], abs=0.05)
        x = theirs.data.qpos[0]
    theirs.close()


@pytest.mark.parametrize("name", THEIRS)
def test_joints_are_observed_under_their_own_names(name: str) -> None:
    family = families.get(name)
    model = TaskModels(family).compile(family.space.task(**nominal(family)))
    joints = [
        model.joint(i).name.removesuffix("_joint")
        for i in range(3 if name in PLANAR else 1, model.njnt)
    ]
    for unit in ("rad", "rad/s"):
        assert [o for o in family.observations if o.endswith(f"_{unit}")][-len(joints) :] == [
            f"{j}_{unit}" for j in joints
        ]


def test_the_humanoids_speed_is_its_centre_of_masss_one_substep_late() -> None:
    env = Env(families.get("HumanoidDir").replace(terminate=None), [{"direction": 0.7}], threads=1)
    model = env.model(env.tasks[0])
    data, scratch = mujoco.MjData(model), mujoco.MjData(model)
    env.reset(4)
    data.qpos, data.qvel = env.state.qpos[0].numpy(), env.state.qvel[0].numpy()

    def centre() -> np.ndarray:
        scratch.qpos = data.qpos
        mujoco.mj_forward(model, scratch)
        return scratch.subtree_com[1, :2].copy()

    rng, late = np.random.default_rng(0), centre()
    for _ in range(30):
        action = rng.uniform(-1, 1, env.act_dim)
        step = env.step(torch.from_numpy(action)[None])
        data.ctrl = action
        mujoco.mj_step(model, data, nstep=4)
        now = centre()
        mujoco.mj_step(model, data)
        onward = ((now - late) @ [math.cos(0.7), math.sin(0.7)]) / env.dt
        assert float(step.terms["speed"][0]) == pytest.approx(onward, abs=1e-9)
        late = now


def test_the_humanoids_actions_are_rescaled_and_its_torques_are_not() -> None:
    theirs = gymnasium.make("Humanoid-v5").unwrapped.model
    ours = TaskModels(families.get("HumanoidDir")).compile(
        families.get("HumanoidDir").space.sample("train", 1)[0]
    )
    assert (ours.actuator_ctrlrange == [-1, 1]).all()
    torque = theirs.actuator_gear[:, 0] * theirs.actuator_ctrlrange[:, 1]
    assert ours.actuator_gear[:, 0] == pytest.approx(torque)


@pytest.mark.parametrize(
    ("name", "file"), [("WalkerParams", "walker2d_v5.xml"), ("HopperParams", "hopper.xml")]
)
def test_writing_masses_down_changes_nothing_of_the_published_model(name: str, file: str) -> None:
    family = families.get(name)
    ours = TaskModels(family).compile(family.space.task(**nominal(family)))
    assert (
        differences(ours, ModelFactory(lambda: read_gymnasium_model(file), []).compile([])) == set()
    )


@pytest.mark.parametrize(("name", "parameter"), SCALED)
def test_a_factor_scales_what_it_names_and_nothing_else(name: str, parameter: str) -> None:
    family = families.get(name)
    models, ones = TaskModels(family), nominal(family)
    one, other = (models.compile(family.space.task(**(ones | {parameter: x}))) for x in (1.0, 1.7))
    target, _, kind = parameter.rpartition("_")
    rows = {
        "mass": lambda: one.body(target).id,
        "inertia": lambda: one.body(target).id,
        "damping": lambda: one.joint(target).dofadr,
        "friction": lambda: (one.geom(target if target == "floor" else f"{target}_geom").id, 0),
    }
    assert differences(one, other) <= {FIELDS[kind]} | DERIVED
    expected = getattr(one, FIELDS[kind]).copy()
    expected[rows[kind]()] *= 1.7
    assert getattr(other, FIELDS[kind]) == pytest.approx(expected, rel=1e-12, abs=0)
    assert differences(one, other) >= {FIELDS[kind]}


def test_every_body_joint_and_foot_varies_by_itself() -> None:
    for name, bodies, feet in (("WalkerParams", 7, 2), ("HopperParams", 4, 1)):
        space = families.get(name).space
        kinds = [p.name.rpartition("_")[2] for p in space.params]
        assert {k: kinds.count(k) for k in FIELDS} == {
            "mass": bodies,
            "inertia": bodies,
            "damping": bodies - 1,
            "friction": feet + 1,
        }
        for p, kind in zip(space.params, kinds, strict=True):
            base = 1.3 if kind == "damping" else 1.5
            assert (p.train.low, p.train.high) == pytest.approx((base**-3, base**3))
            assert (p.extrapolation.low, p.extrapolation.high) == pytest.approx((base**-4, base**4))


@pytest.mark.parametrize("name", PLANAR)
def test_what_reaches_the_floor_first_is_a_foot_unless_the_robot_has_fallen(name: str) -> None:
    """So the friction of nothing else matters."""
    family = families.get(name)
    model = TaskModels(family).compile(family.space.task(**nominal(family)))
    data, rng, first = mujoco.MjData(model), np.random.default_rng(0), []
    lean = {"WalkerParams": 1.0, "HopperParams": 0.2}[name]
    feet = [i for i in range(1, model.ngeom) if model.geom(i).name.startswith("foot")]
    radius, half = model.geom_size[1:, 0], model.geom_size[1:, 1]
    for _ in range(4000):
        data.qpos[1:3] = 1.25, rng.uniform(-lean, lean)
        data.qpos[3:] = rng.uniform(*model.jnt_range[3:].T)
        mujoco.mj_kinematics(model, data)
        lowest = data.geom_xpos[1:, 2] - half * np.abs(data.geom_xmat[1:, 8]) - radius
        data.qpos[1] -= lowest.min()
        down = 1 + int(lowest.argmin())
        fallen = bool(family.interaction.terminate(state(data.qpos.tolist(), [0.0] * model.nv))[0])
        assert down in feet or fallen
        first.append((down in feet, fallen))
    assert {(True, False), (False, True)} <= set(first)


def test_an_ant_is_paid_for_its_speed_in_the_direction() -> None:
    family = families.get("AntDir")
    for angle, speed in (
        (0.0, 0.6),
        (math.pi / 2, -0.8),
        (-math.pi, -0.6),
        (math.atan2(-0.8, 0.6), 1.0),
    ):
        before, after = (
            state([1.0, 1.0, 0.5]),
            state([1.03, 0.96, 0.5], action=[0.5, -1.0], direction=angle),
        )
        terms = {k: float(v) for k, v in family.reward(before, after, 0.05).items()}
        assert terms == pytest.approx({"speed": speed, "control": -1.25, "alive": 1.0})
        assert family.weights == {"speed": 1.0, "control": 0.5, "alive": 1.0}
        assert float(family.display.readout(before, after, 0.05)["onward m/s"]) == pytest.approx(
            speed
        )


def test_an_ant_is_paid_by_how_far_the_goal_is_along_x_and_along_y() -> None:
    family = families.get("AntGoal")
    # a quarter of the disc's area lies within half its radius: the goal is at (0, 1.5)
    after = state([1.0, -0.5, 0.5], action=[0.5, -1.0], goal_angle=math.pi / 2, goal_area=0.25)
    terms = {k: float(v) for k, v in family.reward(after, after, 0.05).items()}
    assert terms == pytest.approx({"distance": -3.0, "control": -1.25})
    assert family.weights == {"distance": 1.0, "control": 0.1}
    assert float(family.display.readout(after, after, 0.05)["to goal m"]) == pytest.approx(
        math.hypot(1, 2)
    )


def test_a_humanoid_is_paid_for_its_centre_of_mass() -> None:
    family = families.get("HumanoidDir")
    moved, later = (
        state([x, 0.0, 1.3], sensors=centre, action=[1.0, 1.0], direction=0.0)
        for x, centre in ((0.03, (0.5, 0.1, 1.0)), (0.2, (0.515, 0.3, 1.0)))
    )
    terms = {k: float(v) for k, v in family.reward(moved, later, 0.015).items()}
    assert terms == pytest.approx({"speed": 1.0, "control": -2.0, "alive": 1.0})
    assert family.weights == pytest.approx({"speed": 1.25, "control": 0.016, "alive": 5.0})


@pytest.mark.parametrize(
    ("name", "qpos", "qvel", "ends"),
    [
        ("AntDir", [0, 0, 0.19], [0], True),
        ("AntDir", [0, 0, 0.2], [0], False),
        ("AntDir", [5, 5, 1.0], [0], False),
        ("AntDir", [0, 0, 1.01], [0], True),
        ("HumanoidDir", [0, 0, 0.99], [0], True),
        ("HumanoidDir", [0, 0, 1.4], [0], False),
        ("HumanoidDir", [0, 0, 2.01], [0], True),
        ("WalkerParams", [0, 0.81, 0.99], [200], False),
        ("WalkerParams", [0, 0.8, 0], [0], True),
        ("WalkerParams", [0, 2.0, 0], [0], True),
        ("WalkerParams", [0, 1.2, -1.0], [0], True),
        ("HopperParams", [0, 0.71, -0.19], [99, -99], False),
        ("HopperParams", [0, 50.0, 0], [0], False),
        ("HopperParams", [0, 0.7, 0], [0], True),
        ("HopperParams", [0, 1.2, 0.2], [0], True),
        ("HopperParams", [0, 1.2, 0], [0, -100], True),
    ],
)
def test_an_episode_ends_where_gymnasiums_does(
    name: str, qpos: list[float], qvel: list[float], ends: bool
) -> None:
    qpos, qvel = ([float(x) for x in values] for values in (qpos, qvel))
    assert bool(families.get(name).interaction.terminate(state(qpos, qvel))[0]) is ends


def test_an_ant_that_seeks_a_goal_never_fails() -> None:
    env = Env(
        replace(families.get("AntGoal"), horizon=5),
        [{"goal_angle": 0.0, "goal_area": 1.0}],
        threads=1,
    )
    for t in range(5):
        env.state.qpos[0, 2] = 3.0
        step = env.step(torch.zeros(1, 8))
        assert (bool(step.terminated[0]), bool(step.truncated[0])) == (False, t == 4)


def test_goals_are_as_likely_on_every_square_metre_of_the_disc() -> None:
    tasks = families.get("AntGoal").space.sample("train", 4000, 0)
    radius = np.array([3 * math.sqrt(t["goal_area"]) for t in tasks])
    angle = np.array([t["goal_angle"] for t in tasks])
    place = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert radius.max() <= 3
    counts = np.histogram2d(*place.T, bins=[np.linspace(-2, 2, 5)] * 2)[
        0
    ]  # squares of 1 m² that lie in the disc
    assert counts == pytest.approx(len(tasks) / (9 * math.pi), rel=0.3)
    assert place.mean(0) == pytest.approx([0, 0], abs=0.1)
    far = [
        3 * math.sqrt(t["goal_area"])
        for t in families.get("AntGoal").space.sample("extrapolate", 200, 0)
    ]
    assert 3 <= min(far) < 3.1
    assert 3.9 < max(far) <= 4


@pytest.mark.parametrize("name", ["AntDir", "HumanoidDir"])
def test_directions_lie_all_around_the_circle(name: str) -> None:
    space = families.get(name).space
    counts, _ = np.histogram(
        [t["direction"] for t in space.sample("train", 2000, 0)], np.linspace(-math.pi, math.pi, 9)
    )
    assert counts == pytest.approx(250, rel=0.25)
    assert space.splits == ("train", "test")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("AntDir", {"direction": 3.2}),
        ("HumanoidDir", {"direction": -3.2}),
        ("AntGoal", {"goal_area": -0.1}),
        ("AntGoal", {"goal_area": 1.8}),
        ("AntGoal", {"goal_angle": 4.0}),
        ("WalkerParams", {"torso_mass": 0.0}),
        ("WalkerParams", {"foot_left_friction": 6.0}),
        ("HopperParams", {"leg_inertia": -1.0}),
        ("HopperParams", {"foot_joint_damping": 3.0}),
    ],
)
def test_a_value_that_no_split_draws_is_refused(name: str, values: dict[str, float]) -> None:
    family = families.get(name)
    with pytest.raises(TaskError, match=f"^{next(iter(values))} = .* is outside its bounds: "):
        family.space.task(**(nominal(family) | values))
