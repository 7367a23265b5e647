import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env, StepResult
from metarobot.envs import quadruped
from metarobot.envs.robots import go2
from metarobot.tasks.distributions import Choice, Mixture, TaskError, Uniform
from metarobot.tasks.family import Family, WorldState, families
from metarobot.tasks.space import Param, SparseFaults, TaskSpace

NAMES = [n for n in families.names() if n.startswith("Quadruped")]
MIX = families.get("QuadrupedMix")
HEALTHY = dict.fromkeys(go2.JOINTS, 1.0)
EASY = {
    **{
        "command_x": 0.5,
        "friction": 0.8,
        "slope": 0.0,
        "roughness": 0.02,
        "terrain": 2.0,
        "terrain_seed": 0.0,
    },
    **{"payload": 0.001, "payload_x": 0.0, "payload_y": 0.0, "latency": 0.005, **HEALTHY},
}
DOWN, COMMAND = slice(0, 3), slice(42, 45)


def quaternion(axis: str, degrees: float) -> np.ndarray:
    quat = np.zeros(4)
    mujoco.mju_axisAngle2Quat(quat, np.eye(3)["xyz".index(axis)], np.radians(degrees))
    return quat


def state(
    quat: Sequence[float] = (1, 0, 0, 0), task: dict[str, float] | None = None, **fields: Any
) -> WorldState:
    """One world at rest in the default pose, but for what is said."""
    qpos = np.concatenate([[0, 0, go2.STANDING_HEIGHT], quat, go2.DEFAULT_POSE])
    values = {
        "qpos": qpos,
        "qvel": np.zeros(18),
        "sensors": np.zeros(40),
        "action": np.zeros(12),
    } | fields
    tensors = {k: torch.as_tensor(v, dtype=torch.float64)[None] for k, v in values.items()}
    return WorldState(
        **tensors, task={k: torch.tensor([v], dtype=torch.float64) for k, v in (task or {}).items()}
    )


def observation(name: str, at: WorldState) -> Tensor:
    return families.get(name).observe(at)[0].double()


def roll(env: Env, steps: int, seed: int = 0) -> list[StepResult]:
    rng = torch.Generator().manual_seed(seed)
    stepped = AutoresetEnv(env)
    return [stepped.step(2 * torch.rand(env.worlds, 12, generator=rng) - 1) for _ in range(steps)]


def test_the_observation_is_what_its_names_say() -> None:
    rng = np.random.default_rng(0)
    qvel, action, off = rng.normal(size=18), rng.normal(size=12), rng.normal(size=12)
    qpos = np.concatenate([[1, 2, 3, 1, 0, 0, 0], go2.DEFAULT_POSE + off])
    at = state(qpos=qpos, qvel=qvel, action=action, task={"command_x": 0.7, "command_turn": -0.4})
    obs = dict(zip(quadruped.OBSERVATIONS, observation("QuadrupedFlat", at).tolist(), strict=True))
    expected = {f"gravity_{a}": x for a, x in zip("xyz", (0, 0, -1), strict=True)}
    expected |= {f"turn_{a}_rad/s": x for a, x in zip("xyz", qvel[3:6], strict=True)}
    for i, joint in enumerate(go2.JOINTS):
        expected |= {
            f"{joint}_rad": off[i],
            f"{joint}_rad/s": qvel[6 + i],
            f"{joint}_action": action[i],
        }
    expected |= {"command_x_m/s": 0.7, "command_y_m/s": 0.0, "command_turn_rad/s": -0.4}
    assert obs == pytest.approx(expected, abs=1e-6)


HALF, MOST = 0.5, 0.75**0.5
TILTS = [("z", 70, (0, 0, -1)), ("x", 180, (0, 0, 1)), ("y", -30, (-HALF, 0, -MOST))]
TILTS += [
    ("y", 30, (HALF, 0, -MOST)),
    ("x", 30, (0, -HALF, -MOST)),
]  # on its nose, on its right side


@pytest.mark.parametrize(("axis", "degrees", "down"), TILTS)
def test_a_tilted_robot_sees_gravity_in_its_own_frame(axis: str, degrees: float, down) -> None:
    assert observation("QuadrupedFlat", state(quaternion(axis, degrees)))[
        DOWN
    ].tolist() == pytest.approx(down, abs=1e-6)


@pytest.mark.parametrize("slope", [-8.0, -3.0, 0.0, 5.0, 12.0])
def test_a_robot_on_a_slope_sees_gravity_tilted_by_it(slope: float) -> None:
    s, c = np.sin(np.radians(slope)), np.cos(np.radians(slope))
    for quat, down in (
        ((1, 0, 0, 0), (-s, 0, -c)),  # facing uphill if positive
        (quaternion("z", 90), (0, s, -c)),
        (quaternion("y", slope), (0, 0, -1)),
    ):
        obs = observation("QuadrupedTerrain", state(quat, {**EASY, "slope": slope}))
        assert obs[DOWN].tolist() == pytest.approx(down, abs=1e-6)
    assert model(slope=slope).opt.gravity == pytest.approx([-9.81 * s, 0, -9.81 * c])


@given(arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1))
@settings(max_examples=50)
def test_rotations_are_mujocos(quat: np.ndarray) -> None:
    quat /= np.linalg.norm(quat)
    expected = np.zeros(9)
    mujoco.mju_quat2Mat(expected, quat)
    assert quadruped.trunk_rotation(state(quat))[0].flatten().numpy() == pytest.approx(
        expected, abs=1e-12
    )


def test_only_quadruped_vel_hides_the_command() -> None:
    for name in NAMES:
        space = families.get(name).space
        task = {p.name: p.train.high for p in space.params}
        shown = observation(name, state(task=task))[COMMAND].tolist()
        command = [task["command_x"], 0.0, task.get("command_turn", 0.0)]
        assert shown == pytest.approx([0.0] * 3 if name == "QuadrupedVel" else command), name
        assert quadruped.critic_observe(state(task=task))[0, -3:].tolist() == pytest.approx(command)


def test_noise_is_bounded_and_other_at_each_step_and_in_each_world() -> None:
    family = families.get("QuadrupedFlat")
    env = Env(family, family.space.sample("train", 3, 0), threads=1)
    bound = torch.tensor(family.interaction.noise)
    errors = [env.reset(0) - family.observe(env.state)]
    for _ in range(150):
        errors.append(env.step(torch.zeros(3, 12)).obs - family.observe(env.state))
    stacked = torch.stack(errors)
    assert (stacked.abs() <= bound + 1e-4).all()
    loud = (stacked / bound)[..., bound > 0]
    assert loud.mean().abs() < 0.02
    assert loud.std() == pytest.approx(3**-0.5, abs=0.02)
    assert len(loud.reshape(-1, loud.shape[-1]).unique(dim=0)) == 3 * 151
    assert (stacked[..., bound == 0] == 0).all()
    pairs = torch.corrcoef(loud.transpose(0, 1).reshape(3, -1)) - torch.eye(3)
    assert pairs.abs().max() < 0.05


def test_noise_depends_on_seed_world_and_episode_alone() -> None:
    family = replace(families.get("QuadrupedFlat"), horizon=6)
    tasks = family.space.sample("train", 3, 0)

    def drawn(env: Env, episode: int) -> Tensor:
        return env.restart(episode) - family.observe(env.state)

    calm = Env(family, tasks, threads=1)
    falling = Env(
        family.replace(terminate=lambda s: torch.tensor([False, True, False])), tasks, threads=1
    )
    for a, b in zip(roll(calm, 20), roll(falling, 20), strict=True):
        assert torch.equal(a.obs[[0, 2]], b.obs[[0, 2]])
        assert torch.equal(a.final_obs[[0, 2]], b.final_obs[[0, 2]])
    assert torch.equal(calm.restart(9), falling.restart(9))
    other = Env(family, tasks[::-1] + tasks, threads=1)
    assert torch.allclose(drawn(other, 5)[:3], drawn(calm, 5), atol=1e-6), (
        "tasks and other worlds change nothing"
    )
    first = drawn(calm, 7)
    for seed, episode in ((0, 8), (1, 7), (0, 7)):
        calm.reset(seed)
        assert torch.allclose(drawn(calm, episode), first, atol=1e-6) == ((seed, episode) == (0, 7))


def test_the_critic_is_shown_velocity_feet_and_command() -> None:
    family = families.get("QuadrupedVel")
    env = Env(family, [{"command_x": 0.3}, {"command_x": 0.9}], threads=1)
    assert env.critic_obs().shape == (2, 14)
    for _ in range(50):
        step = env.step(torch.zeros(2, 12))
    assert torch.equal(step.final_critic_obs, env.critic_obs())
    for world, critic in enumerate(env.critic_obs().double()):
        _, data = env.sim.snapshot(world)
        feet = np.array([data.site(f"{leg}_foot").xpos[2] for leg in go2.LEGS])
        assert critic[:3].numpy() == pytest.approx(
            data.qvel[:3] @ data.body("base").xmat.reshape(3, 3), abs=1e-6
        )
        assert critic[3:7].numpy() == pytest.approx(data.qpos[2] - feet, abs=5e-3)
        force = env.state.sensors[world, 24:28]
        assert critic[7:11].tolist() == (force > 1).tolist()
        assert 100 < force.sum() < 200  # of a robot of 149 N
        assert critic[11:].tolist() == pytest.approx([(0.3, 0.9)[world], 0, 0])
    lifted = state(sensors=np.concatenate([np.zeros(24), [50, 0, 0.5, 9], np.zeros(12)]))
    assert quadruped.critic_observe(lifted)[0, 7:11].tolist() == [1, 0, 0, 1]


def stand(tasks: Sequence[dict[str, float]], steps: int, **changes: Any) -> tuple[Env, Tensor]:
    """Stand under zero actions; the joints' angles, rad, ``(step, world, joint)``."""
    env = Env(MIX.replace(terminate=None, **changes), [{**EASY, **t} for t in tasks], threads=1)
    angles = [env.state.qpos[:, 7:].clone()]
    for _ in range(steps):
        env.step(torch.zeros(env.worlds, 12))
        angles.append(env.state.qpos[:, 7:].clone())
    return env, torch.stack(angles)


WORLD = Env(MIX, [EASY], threads=1)


def model(**task: float) -> mujoco.MjModel:
    """A task's model; all are written into one spec, one after the other."""
    return WORLD.model(MIX.space.coerce({**EASY, **task}))


def posed(of: mujoco.MjModel, offset: float = 0.0, velocity: float = 0.0) -> mujoco.MjData:
    data = mujoco.MjData(of)
    data.qpos[:7], data.qpos[7:], data.qvel[6:] = (
        [0, 0, 0, 1, 0, 0, 0],
        go2.DEFAULT_POSE + offset,
        velocity,
    )
    mujoco.mj_forward(of, data)
    return data


def test_a_weak_drive_gives_its_share_of_the_torque_and_a_dead_or_locked_one_none() -> None:
    whole = posed(model(), -0.2, 0.5).actuator_force.copy()
    assert abs(whole).min() > 1
    for i, name in enumerate(go2.JOINTS):
        for health in (0.9, 0.3, 0.0, -1.0):
            factor, broken = np.ones(12), model(**{name: health})
            factor[i] = max(health, 0.0)
            assert posed(broken, -0.2, 0.5).actuator_force == pytest.approx(whole * factor)
            damping = np.full(12, 0.1)
            damping[i] = quadruped.LOCKED_DAMPING if health < 0 else 0.1
            assert broken.dof_damping[6:].tolist() == damping.tolist()


def test_a_locked_joint_does_not_move_under_the_robots_weight() -> None:
    _, angles = stand([{name: -1.0} for name in go2.JOINTS], 200, horizon=201)
    moved = (angles - angles[0]).abs().amax(0).rad2deg()
    assert moved.diag().max() < 2
    assert moved.max(1).values.min() > 5, "the others do"


@pytest.mark.parametrize(
    ("mass", "x", "y"), [(4.0, 0.12, -0.06), (2.5, -0.1, 0.0), (6.0, 0.0, 0.05)]
)
def test_a_load_weighs_what_it_says_where_it_says(mass: float, x: float, y: float) -> None:
    bare, loaded = model(), model(payload=mass, payload_x=x, payload_y=y)
    total = bare.body_mass.sum() - 0.001
    assert loaded.body_mass.sum() - bare.body_mass.sum() == pytest.approx(mass - 0.001)
    expected = (total * posed(bare).subtree_com[0] + mass * np.array([x, y, 0.09])) / (total + mass)
    assert posed(loaded).subtree_com[0] == pytest.approx(expected, abs=1e-4)


def test_friction_is_that_of_the_floor_under_the_feet() -> None:
    env, _ = stand([{"friction": mu, "payload": 2.0} for mu in (0.21, 0.8, 1.2)], 20)
    for world, mu in enumerate((0.21, 0.8, 1.2)):
        _, data = env.sim.snapshot(world)
        assert data.ncon >= 3
        assert data.contact.friction[:, 0] == pytest.approx(np.full(data.ncon, mu))


def test_latency_delays_every_drive() -> None:
    latencies = np.array([0.005, 0.01, 0.015, 0.02, 0.03])
    assert model(latency=0.015).actuator_delay == pytest.approx(0.015)
    env = Env(MIX, [{**EASY, "latency": t} for t in latencies], threads=1)
    env.step(torch.ones(len(latencies), 12))
    reached = env.sim.bind("act")[:, 0]
    steps = np.array([3, 2, 1, 0, 0])  # of four that a control step has
    assert reached.numpy() == pytest.approx(1 - np.exp(-steps * go2.TIMESTEP / go2.LAG), abs=1e-6)


@given(st.integers(0, 2**32), st.floats(-3, 10))
@settings(max_examples=60, deadline=None)
def test_every_term_of_the_reward_is_bounded(seed: int, magnitude: float) -> None:
    family, rng = families.get("QuadrupedFlat"), np.random.default_rng(seed)

    def wild(n: int) -> Tensor:
        """Numbers of all sizes up to what MuJoCo calls a broken state."""
        return torch.from_numpy(
            rng.choice([-1, 0, 1], (20, n)) * 10 ** rng.uniform(-3, magnitude, (20, n))
        )

    def anything() -> WorldState:
        quat = torch.from_numpy(rng.normal(size=(20, 4)) * rng.choice([0.01, 1], (20, 4)))
        qpos = torch.cat([wild(3), quat / quat.norm(dim=1, keepdim=True), wild(12)], 1)
        task = {
            k: torch.from_numpy(rng.uniform(-2, 2, 20))
            for k in ("command_x", "command_turn", "slope")
        }
        return WorldState(
            qpos, wild(18), wild(40), wild(12).clamp(-go2.ACTION_LIMIT, go2.ACTION_LIMIT), task
        )

    before, after = anything(), anything()
    terms = family.reward(before, after, 0.02)
    assert terms.keys() == family.weights.keys()
    for name, term in terms.items():
        low, high = (0, 1) if name in ("track", "turn", "swing") else (-1, 0)
        assert ((low - 1e-12 <= term) & (term <= high + 1e-12)).all(), name
    assert (
        torch.cat([family.observe(after), family.teaching.critic_observe(after)], 1)
        .isfinite()
        .all()
    )


def test_standing_as_commanded_earns_the_most_and_costs_nothing() -> None:
    feet = np.tile([0.0, 0.0, go2.FOOT_RADIUS], 4)
    at = state(
        sensors=np.concatenate([feet, np.zeros(12), np.full(4, 40.0), np.zeros(12)]),
        task={"command_x": 0.0},
    )
    terms = families.get("QuadrupedFlat").reward(at, at, 0.02)
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(
        {k: float(k in ("track", "turn")) for k in terms}
    )


FALLS = [("x", 40, 0.3, False), ("x", -65, 0.3, True), ("y", 65, 0.3, True), ("z", 120, 0.3, False)]
FALLS += [
    ("x", 0, quadruped.MIN_TRUNK_HEIGHT + 0.01, False),
    ("x", 0, quadruped.MIN_TRUNK_HEIGHT - 0.01, True),
]


@pytest.mark.parametrize(("axis", "degrees", "height", "ended"), FALLS)
def test_a_tilt_and_lying_down_are_falls(
    axis: str, degrees: float, height: float, ended: bool
) -> None:
    for ground in (0.0, -0.4, 3.0):
        qpos = np.concatenate(
            [[0, 0, ground + height], quaternion(axis, degrees), go2.DEFAULT_POSE]
        )
        feet = np.tile([0.0, 0.0, ground], 4)
        feet[2] += 0.1
        assert quadruped.fallen(state(qpos=qpos, sensors=np.r_[feet, np.zeros(28)])).tolist() == [
            ended
        ]


def overturned(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    qpos, qvel = quadruped.start(rng, model)
    qpos[3:7] = [0, 1, 0, 0]
    return qpos, qvel


def test_a_fall_at_the_first_step_starts_anew() -> None:
    family = replace(families.get("QuadrupedFlat"), start=overturned)
    env = Env(family, family.space.sample("train", 3), threads=1)
    for step in roll(env, 5):
        assert step.terminated.all()
        assert not (step.faulted | ~step.obs.isfinite().all(1)).any()
        assert (env.elapsed == 0).all()


def explosive(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    qpos, qvel = quadruped.start(rng, model)
    return qpos, qvel * (1e9 if model.body("payload").mass[0] > 100 else 1.0)


ANYTHING = replace(
    MIX.space,
    params=tuple(replace(p, extrapolation=Uniform(-1e300, 1e300)) for p in MIX.space.params),
)
HARM = {
    "speed": {"payload": 1e3},
    "friction": {"friction": 1e12},
    "strength": {"payload": 1e-9, "FR_thigh": 1e150},
}


@pytest.mark.parametrize("harm", HARM)
def test_exploding_physics_ends_one_worlds_episode_and_is_felt_nowhere_else(harm: str) -> None:
    family = replace(MIX, space=ANYTHING, start=explosive, horizon=12)
    sound, harmed = (Env(family, [EASY, {**EASY, **h}, EASY], threads=1) for h in ({}, HARM[harm]))
    faults = 0
    for a, b in zip(roll(sound, 30), roll(harmed, 30), strict=True):
        for x, y in zip(a._replace(terms=a.reward), b._replace(terms=b.reward), strict=True):
            assert torch.equal(x[[0, 2]], y[[0, 2]])
            assert y.isfinite().all()
        assert b.faulted.tolist() == [False, bool(b.faulted[1]), False]
        assert b.terminated[1] >= b.faulted[1]
        assert all(v.isfinite().all() for v in b.terms.values())
        faults += int(b.faulted.sum())
    assert faults > 0 or harm != "speed"


IMPOSSIBLE = [
    (p.name, x)
    for p in MIX.space.params
    for x in (float("nan"), float("-inf"), -99.5, 1e9, None, "0")
]
IMPOSSIBLE += [
    ("terrain", 1.5),
    ("terrain_seed", 0.5),
    ("FL_hip", 0.7),
    ("payload", 0.0),
    ("friction", 0.0),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_values_are_refused_in_one_line(name: str, value) -> None:
    with pytest.raises(
        TaskError, match=rf"^{name} = [^\n]*(is not a finite number|is outside its bounds: [^\n]*)$"
    ):
        Env(MIX, [{**EASY, name: value}])


def test_ground_that_a_fast_robot_would_run_off_is_refused() -> None:
    params = [p for p in MIX.space.params if p.name != "command_x"]
    for low, high, beyond in ((0, 1.5, 1.5), (0, 1, 3)):
        with pytest.raises(
            TaskError, match=r"^Fast: a terrain of 12 m does not fit a speed of [0-9.]+ m/s$"
        ):
            quadruped.quadruped_family(
                "Fast", "", (quadruped.command_speed(low, high, beyond), *params)
            )
    assert isinstance(
        quadruped.quadruped_family("Slow", "", (quadruped.command_speed(0, 0.5, 0.8), *params)),
        Family,
    )


def odd(task) -> set[str]:
    return {j for j in go2.JOINTS if not 0.9 <= task[j] <= 1.1}


@pytest.mark.parametrize("name", ["QuadrupedDamage", "QuadrupedMix"])
def test_few_joints_break_in_training_and_never_those_for_extrapolation(name: str) -> None:
    space = families.get(name).space
    (faults,) = space.sparse_faults
    assert set(faults.params) | set(faults.extrapolation_params) == set(go2.JOINTS)
    assert not set(faults.params) & set(faults.extrapolation_params)
    for split in ("train", "test"):
        broken = [odd(t) for t in space.sample(split, 400, 1)]
        assert {len(b) for b in broken} == set(range(faults.least, faults.most + 1))
        assert set.union(*broken) == set(faults.params)
    beyond = {p.name: p.train for p in space.params if p.extrapolation}
    far = space.sample("extrapolate", 400, 1)
    turns = [odd(t) for t in far if all(d.contains(t[n]) for n, d in beyond.items())]
    assert len(turns) == pytest.approx(400 / (len(beyond) + 1), rel=0.35)
    assert {len(b) for b in turns} == set(range(1, faults.most + 1))
    assert set.union(*turns) == set(faults.extrapolation_params)
    assert sum(bool(odd(t) & set(faults.extrapolation_params)) for t in far) == len(turns)


PARTS = Mixture((0.5, 0.5), (Uniform(0.9, 1.1), Choice((0.0,))))
ONE = Mixture((1.0,), (Choice((1.0,)),))
PARAMS = tuple(
    Param(name=n, train=t)
    for n, t in (("a", PARTS), ("b", PARTS), ("one", ONE), ("x", Uniform(0, 1)))
)
BAD = {
    "Space: 'z' is not a parameter drawn from a mixture": SparseFaults(
        params=("a", "z"), least=1, most=1
    ),
    "Space: 'y' is not a parameter drawn from a mixture": SparseFaults(
        params=("a",), least=1, most=1, extrapolation_params=("y",)
    ),
    "Space: 'x' is not a parameter drawn from a mixture": SparseFaults(
        params=("a", "x"), least=1, most=1
    ),
    "Space: there cannot be 1 to 3 faults among 2 parameters": SparseFaults(
        params=("a", "b"), least=1, most=3
    ),
    "Space: there cannot be 2 to 1 faults among 2 parameters": SparseFaults(
        params=("a", "b"), least=2, most=1
    ),
    "Space: there cannot be -1 to 1 faults among 2 parameters": SparseFaults(
        params=("a", "b"), least=-1, most=1
    ),
    "one": SparseFaults(params=("a", "one"), least=1, most=1),  # which has nothing to depart to
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_sparse_faults_are_refused(message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskSpace("Space", PARAMS, (BAD[message],))


@pytest.mark.parametrize("name", NAMES)
def test_a_space_is_described_written_read_back_and_encoded(name: str) -> None:
    space = families.get(name).space
    text = space.describe()
    assert all(p.name in text for p in space.params)
    for faults in space.sparse_faults:
        assert text.index(f"{faults.least} to {faults.most} at a time") < text.index(
            ", ".join(faults.extrapolation_params)
        )
    back = TaskSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert back == space
    assert back.sample("extrapolate", 5, 3) == space.sample("extrapolate", 5, 3)
    others = [
        replace(
            space,
            sparse_faults=(
                *space.sparse_faults[1:],
                *(replace(f, least=f.least + 1) for f in space.sparse_faults),
            ),
        )
    ]
    others += [
        replace(space, params=tuple(replace(p, nuisance=not p.nuisance) for p in space.params))
    ]
    assert sum(s.hash != space.hash for s in others) == len(others) - (not space.sparse_faults)
    tasks = space.sample("train", 200, 0)
    seeded = [
        replace(t, values=tuple((n, 7.0 if n == "terrain_seed" else x) for n, x in t.values))
        for t in tasks
    ]
    codes = space.encode(tasks)
    assert (
        codes.shape
        == (200, space.width)
        == (200, len(space.params) - ("terrain_seed" in space.names))
    )
    assert codes.abs().max() <= 1 + 1e-6
    assert torch.equal(codes, space.encode(seeded))
