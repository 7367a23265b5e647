import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from metarobot.env.base import Env
from metarobot.tasks.family import families
from metarobot.tasks.model_edits import Edit, ModelError, ModelFactory

FAMILIES = families.names()
XML = """
<mujoco>
  <option gravity="0 0 -9.81"/>
  <worldbody>
    <geom name="floor" type="plane" size="1 1 1" friction="0.4 0.01 0.001"/>
    <body name="ball" pos="0 0 1">
      <joint name="slide" type="slide" axis="1 0 0" armature="0.5"/>
      <geom name="ball" size="0.1" mass="2"/>
      <site name="tip"/>
    </body>
  </worldbody>
  <actuator><motor name="push" joint="slide" gear="3 0 0 0 0 0"/></actuator>
</mujoco>
"""
FRICTION = {"element": "geom", "name": "floor", "field": "friction", "index": 0}
GEAR = {"element": "actuator", "name": "push", "field": "gear", "index": 0}
GRAVITY = {"element": "option", "field": "gravity", "op": "rotate_y"}


def ball() -> mujoco.MjSpec:
    return mujoco.MjSpec.from_string(XML)


def compiled(value: float, **edit) -> mujoco.MjModel:
    return ModelFactory(ball, [Edit(**edit)]).compile([value])


def packed(model: mujoco.MjModel) -> bytes:
    buffer = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return buffer.tobytes()


def test_set_writes_the_value() -> None:
    assert compiled(0.9, **FRICTION).geom("floor").friction.tolist() == [0.9, 0.01, 0.001]
    assert compiled(5, element="geom", name="ball", field="mass").body("ball").mass[0] == 5


def test_scale_multiplies_the_nominal_value() -> None:
    assert compiled(-0.5, op="scale", **GEAR).actuator("push").gear.tolist() == [
        -1.5,
        0,
        0,
        0,
        0,
        0,
    ]


def test_add_is_added_to_the_nominal_value() -> None:
    assert (
        compiled(0.25, element="joint", name="slide", field="armature", op="add").dof_armature[0]
        == 0.75
    )
    assert (
        compiled(0.25, element="body", name="ball", field="pos", index=2, op="add")
        .body("ball")
        .pos[2]
        == 1.25
    )


def test_rotate_y_turns_gravity_so_that_a_positive_slope_is_uphill() -> None:
    assert compiled(0, **GRAVITY).opt.gravity == pytest.approx([0, 0, -9.81])
    assert compiled(90, **GRAVITY).opt.gravity == pytest.approx([-9.81, 0, 0])
    assert compiled(-30, **GRAVITY).opt.gravity == pytest.approx([9.81 / 2, 0, -9.81 * 3**0.5 / 2])


def test_edits_start_from_the_nominal_model_and_never_compound() -> None:
    edits = [Edit(**FRICTION), Edit(op="scale", **GEAR), Edit(**GRAVITY)]
    edits.append(Edit(element="joint", name="slide", field="armature", op="add"))
    factory = ModelFactory(ball, edits)
    first = packed(factory.compile([0.7, 0.5, 10, 0.1]))
    others = [packed(factory.compile(v)) for v in ([0.1, -2, -5, 0.3], [1.3, 0, 40, 0.2])]
    assert len({first, *others}) == 3
    assert packed(factory.compile([0.7, 0.5, 10, 0.1])) == first
    assert packed(ModelFactory(ball, edits).compile([0.7, 0.5, 10, 0.1])) == first


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_models_do_not_compound_either(name: str) -> None:
    family = families.get(name)
    edits = [(p.name, e) for p in family.space.params for e in p.edits]
    factory = ModelFactory(family.spec, [e for _, e in edits])
    one, two = ([t[n] for n, _ in edits] for t in family.space.sample("train", 2, 0))
    first, other = packed(factory.compile(one)), packed(factory.compile(two))
    assert packed(factory.compile(one)) == first
    assert (other == first) == (not edits)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"element": "geom", "name": "flor", "field": "mass"},
            "no geom called 'flor'; there are: floor, ball",
        ),
        (
            {"element": "body", "name": "bal", "field": "mass"},
            "no body called 'bal'; there are: world, ball",
        ),
        (
            {"element": "joint", "name": "x", "field": "damping"},
            "no joint called 'x'; there are: slide",
        ),
        (
            {"element": "actuator", "name": "x", "field": "gear"},
            "no actuator called 'x'; there are: push",
        ),
        ({"element": "site", "name": "x", "field": "pos"}, "no site called 'x'; there are: tip"),
        (
            {"element": "geom", "name": "floor", "field": "frction"},
            "geom 'floor' has no field 'frction'; it has: ",
        ),
        ({"element": "option", "field": "graviti"}, "option '' has no field 'graviti'; it has: "),
        (
            {**FRICTION, "index": 3},
            "set geom floor friction[3]: friction needs an index from 0 to 2",
        ),
        (
            {**FRICTION, "index": None},
            "set geom floor friction: friction needs an index from 0 to 2",
        ),
        (
            {"element": "geom", "name": "ball", "field": "mass", "index": 0},
            "set geom ball mass[0]: mass is a single number and takes no index",
        ),
        ({**GRAVITY, "index": 0}, "rotate_y option gravity[0]: only a whole 3-vector turns"),
        (
            {"element": "gem", "field": "mass"},
            "'gem' is not one of: geom, body, joint, actuator, site, option",
        ),
        (
            {"element": "geom", "field": "mass", "op": "sub"},
            "'sub' is not one of: set, scale, add, rotate_y",
        ),
    ],
)
def test_an_edit_of_what_is_not_there_says_what_is(edit, message: str) -> None:
    with pytest.raises(ModelError) as error:
        compiled(1.0, **edit)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_misspelt_field_is_answered_with_the_right_one() -> None:
    with pytest.raises(ModelError, match=r"has no field 'frction'; it has: .*friction"):
        compiled(1.0, element="geom", name="floor", field="frction")


def test_a_model_that_does_not_compile_says_so_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"^the model does not compile: [^\n]+$"):
        compiled(-1.0, element="geom", name="ball", field="size", index=0)


PARAMETERS = [(name, p.name) for name in FAMILIES for p in families.get(name).space.params]


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_every_task_parameter_changes_the_dynamics_or_the_reward(name: str, parameter: str) -> None:
    family = families.get(name)
    base = family.space.sample("train", 1, 0)[0].as_dict()
    train = next(p.train for p in family.space.params if p.name == parameter)
    # both ends of an angle's range are the same direction, so the base is there too
    tasks = [base, {**base, parameter: train.low}, {**base, parameter: train.high}]
    env = Env(family, tasks, threads=1)
    rng = torch.Generator().manual_seed(0)
    qpos = env.sim.bind("qpos")
    env.sim.reset(qpos[:1].expand(3, -1).clone(), env.sim.bind("qvel")[:1].expand(3, -1).clone())
    rewards = torch.zeros(3)
    for _ in range(20):
        rewards += env.step(2 * torch.rand(1, env.act_dim, generator=rng).expand(3, -1) - 1).reward
    felt = torch.cat([qpos, rewards[:, None]], 1)
    assert (felt - felt[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stripped_model_steps_exactly_as_the_full_one(name: str) -> None:
    family = families.get(name)
    task = family.space.sample("train", 1, 0)[0]
    edits = [(p.name, e) for p in family.space.params for e in p.edits]
    stripped, full = (
        ModelFactory(family.spec, [e for _, e in edits], visual=visual).compile(
            [task[n] for n, _ in edits]
        )
        for visual in (False, True)
    )
    textured = full.ntex > 0
    assert mujoco.mj_sizeModel(stripped) <= (0.2 if textured else 1.0) * mujoco.mj_sizeModel(full)
    rng = np.random.default_rng(0)
    a, b = mujoco.MjData(stripped), mujoco.MjData(full)
    for _ in range(200):
        a.ctrl[:] = b.ctrl[:] = rng.uniform(-1, 1, full.nu)
        mujoco.mj_step(stripped, a)
        mujoco.mj_step(full, b)
    assert (a.qpos == b.qpos).all()
    assert (a.qvel == b.qvel).all()


def test_cheetah_vel_is_gymnasiums_half_cheetah_with_another_reward() -> None:
    target = 1.5
    env = Env(families.get("CheetahVel"), [{"target_speed": target}], threads=1)
    theirs = gymnasium.make("HalfCheetah-v5").unwrapped
    obs = env.reset(4)
    theirs.reset(seed=0)
    theirs.set_state(env.sim.bind("qpos")[0].numpy().copy(), env.sim.bind("qvel")[0].numpy().copy())
    rng = np.random.default_rng(0)
    assert env.dt == pytest.approx(theirs.dt)
    for _ in range(50):
        action = rng.uniform(-1, 1, 6)
        step = env.step(torch.from_numpy(action)[None])
        obs, _, _, _, info = theirs.step(action)
        reward = -abs(info["x_velocity"] - target) - 0.05 * (action**2).sum()
        assert step.obs[0].numpy() == pytest.approx(obs, abs=1e-5)
        assert float(step.reward[0]) == pytest.approx(reward, abs=1e-5)
    theirs.close()


def test_the_payload_is_added_to_the_published_robots_mass() -> None:
    robot = ModelFactory(families.get("CheetahVel").spec, []).compile([])
    loaded = ModelFactory(families.get("CheetahTerrain").spec, []).compile([])
    assert robot.body_mass.sum() == pytest.approx(14.0)
    assert loaded.body_mass[:-1] == pytest.approx(robot.body_mass)
    assert loaded.body_inertia[:-1] == pytest.approx(robot.body_inertia)
    assert loaded.body("payload").mass[0] == 1.0


def test_a_heavier_load_and_a_steeper_slope_are_what_they_say() -> None:
    family = families.get("CheetahTerrain")
    task = {p.name: 1.0 for p in family.space.params}
    env = Env(
        family,
        [{**task, "payload": 0.5, "slope": 0.0}, {**task, "payload": 3.0, "slope": 4.0}],
        threads=1,
    )
    light, heavy = (env.model(t) for t in env.tasks)
    assert heavy.body_mass - light.body_mass == pytest.approx(np.eye(light.nbody)[-1] * 2.5)
    assert np.degrees(np.arctan2(-heavy.opt.gravity[0], -heavy.opt.gravity[2])) == pytest.approx(
        4.0
    )
    assert np.linalg.norm(heavy.opt.gravity) == pytest.approx(9.81)
