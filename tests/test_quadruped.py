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

from metarobot.env import Env, State, Step, families
from metarobot.envs import go2, quadruped

NAMES = [n for n in families.names() if n.startswith("Quadruped")]
MIX = families.get("QuadrupedMix")
HEALTHY = dict.fromkeys(go2.JOINTS, 1.0)
EASY = {
    **{"command_x": 0.5, "friction": 0.8, "slope": 0.0, "roughness": 0.02, "terrain": 2.0, "terrain_seed": 0.0},
    **{"payload": 0.001, "payload_x": 0.0, "payload_y": 0.0, "latency": 0.005, **HEALTHY},
}
DOWN, TURN, ANGLES, SPEEDS, ACTION, TOLD = (slice(a, b) for a, b in zip((0, 3, 6, 18, 30, 42), (3, 6, 18, 30, 42, 45)))
PLACE, MOTION, FORCE, TORQUE = slice(0, 12), slice(12, 24), slice(24, 28), slice(28, 40)


def quaternion(axis: Sequence[float], degrees: float) -> np.ndarray:
    quat = np.zeros(4)
    mujoco.mju_axisAngle2Quat(quat, np.array(axis, float), np.radians(degrees))
    return quat


def state(quat: Sequence[float] = (1, 0, 0, 0), task: dict[str, float] | None = None, **fields: Any) -> State:
    """One world at rest in the default pose, but for what is said."""
    qpos = np.concatenate([[0, 0, go2.HEIGHT], quat, go2.POSE])
    values = {"qpos": qpos, "qvel": np.zeros(18), "sensors": np.zeros(40), "action": np.zeros(12)} | fields
    tensors = {k: torch.as_tensor(v, dtype=torch.float64)[None] for k, v in values.items()}
    return State(**tensors, task={k: torch.tensor([v], dtype=torch.float64) for k, v in (task or {}).items()})


def seen(name: str, at: State) -> Tensor:
    return families.get(name).observe(at)[0].double()


def roll(env: Env, steps: int, seed: int = 0) -> list[Step]:
    rng = torch.Generator().manual_seed(seed)
    return [env.step(2 * torch.rand(env.worlds, 12, generator=rng) - 1) for _ in range(steps)]


def test_the_observation_is_what_its_names_say() -> None:
    rng = np.random.default_rng(0)
    qvel, action, off = rng.normal(size=18), rng.normal(size=12), rng.normal(size=12)
    qpos = np.concatenate([[1, 2, 3, 1, 0, 0, 0], go2.POSE + off])
    at = state(qpos=qpos, qvel=qvel, action=action, task={"command_x": 0.7, "command_turn": -0.4})
    obs = dict(zip(quadruped.OBSERVATIONS, seen("QuadrupedFlat", at).tolist(), strict=True))
    expected = {f"gravity_{a}": x for a, x in zip("xyz", (0, 0, -1), strict=True)}
    expected |= {f"turn_{a}_rad/s": x for a, x in zip("xyz", qvel[3:6], strict=True)}
    for i, joint in enumerate(go2.JOINTS):
        expected |= {f"{joint}_rad": off[i], f"{joint}_rad/s": qvel[6 + i], f"{joint}_action": action[i]}
    expected |= {"command_x_m/s": 0.7, "command_y_m/s": 0.0, "command_turn_rad/s": -0.4}
    assert list(obs) == list(quadruped.OBSERVATIONS)
    assert obs == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("axis", "degrees", "down"),
    [
        ((0, 0, 1), 70, (0, 0, -1)),
        ((0, 1, 0), 30, (0.5, 0, -(3**0.5) / 2)),  # nose down: gravity pulls forward
        ((0, 1, 0), -30, (-0.5, 0, -(3**0.5) / 2)),
        ((1, 0, 0), 30, (0, -0.5, -(3**0.5) / 2)),  # right side down: gravity pulls to the right
        ((1, 0, 0), 180, (0, 0, 1)),
    ],
)
def test_a_tilted_robot_sees_gravity_in_its_own_frame(axis, degrees: float, down) -> None:
    assert seen("QuadrupedFlat", state(quaternion(axis, degrees)))[DOWN].tolist() == pytest.approx(down, abs=1e-6)


@pytest.mark.parametrize("slope", [-12.0, -3.0, 0.0, 5.0, 8.0])
def test_a_robot_on_a_slope_sees_gravity_tilted_by_it(slope: float) -> None:
    task = {**EASY, "slope": slope}
    s = np.radians(slope)
    level = seen("QuadrupedTerrain", state(task=task))[DOWN].numpy()
    assert level == pytest.approx([-np.sin(s), 0, -np.cos(s)], abs=1e-6)
    assert seen("QuadrupedTerrain", state(quaternion((0, 0, 1), 90), task))[DOWN].numpy() == pytest.approx(
        [0, np.sin(s), -np.cos(s)], abs=1e-6
    )
    upright = seen("QuadrupedTerrain", state(quaternion((0, 1, 0), slope), task))[DOWN]
    assert upright.tolist() == pytest.approx([0, 0, -1], abs=1e-6)
    model = Env(MIX, [{**EASY, "slope": float(np.clip(slope, -8, 12))}], threads=1).sim.snapshot(0)[0]
    if slope >= -8:
        assert model.opt.gravity / 9.81 == pytest.approx(level, abs=1e-6)


@given(arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1))
@settings(max_examples=50)
def test_rotations_are_mujocos(quat: np.ndarray) -> None:
    quat /= np.linalg.norm(quat)
    expected = np.zeros(9)
    mujoco.mju_quat2Mat(expected, quat)
    assert quadruped.rotation(state(quat).qpos)[0].flatten().numpy() == pytest.approx(expected, abs=1e-12)


def test_only_quadruped_vel_hides_the_command() -> None:
    for name in NAMES:
        space = families.get(name).space
        task = {p.name: p.train.high for p in space.params}
        told = seen(name, state(task=task))[TOLD].tolist()
        command = [task["command_x"], 0.0, task.get("command_turn", 0.0)]
        assert told == pytest.approx([0.0] * 3 if name == "QuadrupedVel" else command), name
        assert quadruped.critic_observe(state(task=task))[0, -3:].tolist() == pytest.approx(command)


def test_noise_is_bounded_and_other_at_each_step_and_in_each_world() -> None:
    family = families.get("QuadrupedFlat")
    env = Env(family, family.space.sample("train", 3, 0), threads=1)
    bound = torch.tensor(family.noise)
    assert len(bound) == env.obs_dim
    assert (bound[DOWN.start : SPEEDS.stop] > 0).all()
    errors = []
    for obs in (env.reset(0), *(s.obs for s in roll(env, 150))):
        errors.append(obs - family.observe(env.state))
    stacked = torch.stack(errors)
    assert (stacked.abs() <= bound + 1e-4).all()
    loud = (stacked / bound)[..., bound > 0]
    assert loud.abs().max() > 0.98
    assert loud.mean().abs() < 0.02
    assert loud.std() == pytest.approx(3**-0.5, abs=0.02)
    assert len(loud.reshape(-1, loud.shape[-1]).unique(dim=0)) == 3 * 151
    assert (stacked[..., bound == 0] == 0).all()
    pairs = torch.corrcoef(loud.transpose(0, 1).reshape(3, -1)) - torch.eye(3)
    assert pairs.abs().max() < 0.05


def noise(env: Env, steps: int) -> list[Tensor]:
    return [s.final_obs - env.family.observe(env.state) for s in roll(env, steps) if not s.terminated.any()]


def test_noise_depends_on_seed_world_and_episode_alone() -> None:
    family = replace(families.get("QuadrupedFlat"), horizon=6)
    tasks = family.space.sample("train", 3, 0)

    def steady(**settings: Any) -> Env:
        return Env(replace(family, **settings), tasks, threads=1)

    def drawn(env: Env, episode: int) -> Tensor:
        return env.restart(episode) - family.observe(env.state)

    calm = steady()
    falling = steady(terminate=lambda s: torch.tensor([False, True, False]))
    for a, b in zip(roll(calm, 20), roll(falling, 20), strict=True):
        assert torch.equal(a.obs[[0, 2]], b.obs[[0, 2]])
        assert torch.equal(a.final_obs[[0, 2]], b.final_obs[[0, 2]])
    assert torch.equal(calm.restart(9), falling.restart(9))
    other = Env(family, tasks[::-1] + tasks, threads=1)
    other.reset(0)
    assert torch.equal(drawn(other, 9)[:3, :3] != 0, torch.ones(3, 3).bool())
    assert torch.allclose(drawn(other, 5)[:3], drawn(calm, 5), atol=1e-6), "the task and the number of worlds do not"
    first = drawn(calm, 7)
    assert not torch.allclose(drawn(calm, 8)[:, :6], first[:, :6], atol=1e-4)
    calm.reset(1)
    assert not torch.allclose(drawn(calm, 7)[:, :6], first[:, :6], atol=1e-4)
    calm.reset(0)
    assert torch.allclose(drawn(calm, 7), first, atol=1e-6)


def test_the_critic_is_shown_velocity_feet_and_command() -> None:
    family = families.get("QuadrupedVel")
    env = Env(family, [{"command_x": 0.3}, {"command_x": 0.9}], threads=1)
    assert env.critic_obs().shape == (2, 14)
    for _ in range(50):
        step = env.step(torch.zeros(2, 12))
    assert torch.equal(step.final_critic_obs, env.critic_obs())
    for world, told in enumerate(env.critic_obs().double()):
        _, data = env.sim.snapshot(world)
        feet = np.array([data.site(f"{leg}_foot").xpos[2] for leg in go2.LEGS])
        turn = data.body("base").xmat.reshape(3, 3)
        assert told[:3].numpy() == pytest.approx(turn.T @ data.qvel[:3], abs=1e-6)
        assert told[3:7].numpy() == pytest.approx(data.qpos[2] - feet, abs=5e-3)
        assert told[7:11].tolist() == [1, 1, 1, 1]
        assert told[11:].tolist() == pytest.approx([(0.3, 0.9)[world], 0, 0])
    lifted = state(sensors=np.concatenate([np.zeros(24), [50, 0, 0.5, 9], np.zeros(12)]))
    assert quadruped.critic_observe(lifted)[0, 7:11].tolist() == [1, 0, 0, 1]


def lived(tasks: Sequence[dict[str, float]], steps: int, **changes: Any) -> tuple[Env, Tensor]:
    """Stand under zero actions; the states of the joints at each step, rad, ``(step, world, joint)``."""
    env = Env(replace(MIX, terminate=None, **changes), [{**EASY, **t} for t in tasks], threads=1)
    angles = [env.state.qpos[:, 7:].clone()]
    for _ in range(steps):
        env.step(torch.zeros(env.worlds, 12))
        angles.append(env.state.qpos[:, 7:].clone())
    return env, torch.stack(angles)


def model(**task: float) -> mujoco.MjModel:
    return Env(MIX, [{**EASY, **task}], threads=1).sim.snapshot(0)[0]


def force(of: mujoco.MjModel, offset: float) -> np.ndarray:
    data = mujoco.MjData(of)
    data.qpos[2:4], data.qpos[7:], data.qvel[6:] = 2, go2.POSE + offset, 0.5
    mujoco.mj_forward(of, data)
    return data.actuator_force.copy()


def test_a_weak_drive_gives_its_share_of_the_torque_and_a_dead_or_locked_one_none() -> None:
    for i, name in enumerate(go2.JOINTS):
        whole, factor = force(model(), -0.2), np.ones(12)
        for health in (0.9, 0.3, 0.0, -1.0):
            factor[i] = max(health, 0.0)
            assert force(model(**{name: health}), -0.2) == pytest.approx(whole * factor)
    assert abs(whole).min() > 1


def test_a_dead_drive_stays_without_torque_while_the_robot_moves() -> None:
    env = Env(replace(MIX, terminate=None), [{**EASY, "FR_calf": 0.0, "RL_hip": 0.0}], threads=1)
    for step in roll(env, 30):
        assert step.final_obs.isfinite().all()
        assert (env.state.sensors[0, TORQUE] == 0).tolist() == [j in ("FR_calf", "RL_hip") for j in go2.JOINTS]


def test_a_locked_joint_does_not_move_under_the_robots_weight() -> None:
    _, angles = lived([{name: -1.0} for name in go2.JOINTS], 200, horizon=201)
    for i in range(12):
        moved = angles[:, i, i] - angles[0, i, i]
        assert np.degrees(moved.abs().max()) < 2, go2.JOINTS[i]
        assert np.degrees((angles[:, (i + 1) % 12, i] - angles[0, (i + 1) % 12, i]).abs().max()) > 2


def com(of: mujoco.MjModel) -> np.ndarray:
    data = mujoco.MjData(of)
    data.qpos[3], data.qpos[7:] = 1, go2.POSE
    mujoco.mj_forward(of, data)
    return data.subtree_com[0].copy()


@pytest.mark.parametrize(("mass", "x", "y"), [(4.0, 0.12, -0.06), (2.5, -0.1, 0.0), (6.0, 0.0, 0.05)])
def test_a_load_weighs_what_it_says_where_it_says(mass: float, x: float, y: float) -> None:
    bare, loaded = model(), model(payload=mass, payload_x=x, payload_y=y)
    total = bare.body_mass.sum() - 0.001
    assert loaded.body_mass.sum() - bare.body_mass.sum() == pytest.approx(mass - 0.001)
    expected = (total * com(bare) + mass * np.array([x, y, 0.09])) / (total + mass)
    assert com(loaded) == pytest.approx(expected, abs=1e-4)


def test_friction_is_that_of_the_floor_under_the_feet() -> None:
    env, _ = lived([{"friction": mu, "payload": 2.0} for mu in (0.21, 0.8, 1.2)], 20)
    for world, mu in enumerate((0.21, 0.8, 1.2)):
        _, data = env.sim.snapshot(world)
        assert data.ncon >= 3
        assert data.contact.friction[:, 0] == pytest.approx(np.full(data.ncon, mu))


def test_latency_delays_every_drive() -> None:
    assert (model(latency=0.013).actuator_delay == 0.013).all()
    env = Env(MIX, [{**EASY, "latency": t} for t in (0.005, 0.0125, 0.0375)], threads=1)
    env.step(torch.ones(3, 12))
    reached = env.sim.bind("act")[:, 0]
    steps = torch.tensor([3, 1, 0])  # of four that a control step has
    assert reached.numpy() == pytest.approx(1 - np.exp(-steps * go2.TIMESTEP / go2.LAG), abs=1e-6)


def test_a_slope_pulls_back_uphill() -> None:
    env, _ = lived([{"slope": s, "friction": 0.2} for s in (12.0, -8.0)], 60)
    assert env.state.qpos[0, 0] < -0.05 < 0.05 < env.state.qpos[1, 0]


def test_every_combination_of_two_broken_joints_is_one_model_from_the_nominal() -> None:
    family = families.get("QuadrupedDamage")
    env = Env(family, [{"command_x": 0.5, **HEALTHY}], threads=1)
    first = env.sim.snapshot(0)[0]
    broken = family.space.coerce({"command_x": 0.5, **HEALTHY, "FL_hip": -1.0, "RR_calf": 0.3})
    assert env.model(broken).dof_damping.max() == quadruped.LOCK
    env._models.clear()
    again = env.model(env.tasks[0])
    for field in ("dof_damping", "actuator_gainprm", "actuator_biasprm", "actuator_delay"):
        assert (getattr(again, field) == getattr(first, field)).all()


wild = st.floats(-1e10, 1e10) | st.floats(-3, 3)


@st.composite
def states(draw) -> State:
    quat = draw(arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1))
    qpos = np.concatenate([draw(arrays(np.float64, 3, elements=wild)), quat / np.linalg.norm(quat),
                           draw(arrays(np.float64, 12, elements=wild))])  # fmt: skip
    fields = {k: draw(arrays(np.float64, n, elements=wild)) for k, n in (("qvel", 18), ("sensors", 40))}
    action = draw(arrays(np.float64, 12, elements=st.floats(-go2.ACTION_LIMIT, go2.ACTION_LIMIT)))
    task = {
        "command_x": draw(st.floats(0, 2)),
        "command_turn": draw(st.floats(-2, 2)),
        "slope": draw(st.floats(-12, 12)),
    }
    return state(qpos=qpos, action=action, task=task, **fields)
