import itertools
from functools import cache
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from walks import FAMILY, WEIGHTS, RecordedEpisode, reading_of, rotation
from walks import legged_meta as meta

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.layouts.leg_odometry import LegKinematics, LegOdometry, cross, up_direction
from metarobot.bridge.layouts.legged import LeggedLayout
from metarobot.bridge.layouts.named_signals import NamedSignalsLayout
from metarobot.bridge.robot_interface import GYRO, QUAT
from metarobot.deploy.sim_robot_body import SimulatedRobot
from metarobot.env.base import Env
from metarobot.envs.robots import go2
from metarobot.tasks.family import families
from metarobot.tasks.model_edits import compile_spec


@cache
def walk(noise: bool) -> RecordedEpisode:
    return RecordedEpisode("QuadrupedFlat-rl2", 3, noise)


def estimated(
    episode: RecordedEpisode,
) -> tuple[list[dict[str, float]], list[float], list[np.ndarray], LeggedLayout]:
    layout = LeggedLayout(meta())
    terms, rewards, velocity = [], [], []
    pairs = zip(
        itertools.pairwise(episode.readings), itertools.pairwise(episode.actions), strict=True
    )
    for (before, after), (last, action) in pairs:
        rewards.append(layout.reward(before, after, action, last))
        terms.append(layout.terms)
        velocity.append(layout._update(after).motion.velocity)
        assert not layout.ended(after)
    return terms, rewards, velocity, layout


def test_feet_are_where_mujoco_has_them_and_move_as_there() -> None:
    model = compile_spec(go2.go2())
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    legs = [
        LegKinematics(places) for places in FAMILY.deployment.hardware().reward["legs"].values()
    ]
    for _ in range(20):
        data.qpos[:], data.qvel[:] = 0, 0
        data.qpos[3:7] = rng.standard_normal(4)
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        data.qpos[7:], data.qvel[6:] = rng.uniform(-2, 2, 12), rng.uniform(-9, 9, 12)
        mujoco.mj_forward(model, data)
        moved = [
            leg.foot_motion(data.qpos[7 + 3 * i :][:3], data.qvel[6 + 3 * i :][:3])
            for i, leg in enumerate(legs)
        ]
        place, speed = (np.array(x) for x in zip(*moved, strict=True))
        turn = rotation(data.qpos[3:7])
        assert place @ turn.T == pytest.approx(
            np.stack([data.site(f"{leg}_foot").xpos for leg in go2.LEGS]), abs=1e-6
        )
        moving = np.stack([data.sensor(f"{leg}_framelinvel").data for leg in go2.LEGS])
        assert speed @ turn.T == pytest.approx(moving, abs=1e-6)


def test_vector_products_and_what_is_up() -> None:
    rng = np.random.default_rng(1)
    a, b, quat = rng.standard_normal(3), rng.standard_normal(3), rng.standard_normal(4)
    assert cross(a, b) == pytest.approx(np.cross(a, b))
    assert up_direction(quat) == pytest.approx(rotation(quat / np.linalg.norm(quat))[2])
    with pytest.raises(BridgeError, match="quaternion of zeros"):
        up_direction([0.0, 0.0, 0.0, 0.0])


def test_observations_are_those_of_the_family() -> None:
    family = families.get("QuadrupedMix")  # its slopes turn gravity
    quiet, rng = family.replace(noise=()), np.random.default_rng(0)
    tasks = family.space.sample("test", 3)
    robot, env = SimulatedRobot(family, tasks, noise=False), Env(quiet, tasks, threads=1)
    layout, seq, last = LeggedLayout(meta(family)), 1, np.zeros(12, np.float32)
    robot.restart(1, 0)
    obs = env.reset(0)
    for _ in range(60):
        assert layout.observe(reading_of(robot, seq), last) == pytest.approx(
            obs[1].numpy(), abs=1e-5
        )
        last = (0.3 * rng.standard_normal(12)).astype(np.float32)
        robot.command(np.array(list(layout.targets(last).values())))
        robot.advance(family.substeps)
        obs, seq = env.step(torch.from_numpy(last).expand(3, -1)).final_obs, seq + 1
    assert robot.returns != 0


def test_noise_comes_through_as_in_training() -> None:
    robot = SimulatedRobot(FAMILY, FAMILY.space.sample("test", 1))
    obs = LeggedLayout(meta()).observe(reading_of(robot, 1), np.zeros(12))
    assert obs.dtype == np.float32
    assert obs[3:] == pytest.approx(robot.obs[0, 3:].numpy(), abs=1e-5)
    wanted = robot.obs[0, :3].numpy()
    assert obs[:3] == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-5)


def test_targets_undo_what_the_drives_make_of_actions() -> None:
    layout, action = LeggedLayout(meta()), np.linspace(-4, 4, 12, dtype=np.float32)
    targets = layout.targets(action)
    assert list(targets) == [f"{j}.pos" for j in go2.JOINTS]
    assert list(targets.values()) == pytest.approx(go2.DEFAULT_POSE + go2.ACTION_SCALE * action)


def test_reward_terms_of_clean_signals_are_the_simulators() -> None:
    """Those that need no velocity are exact; those that do follow leg odometry."""
    episode = walk(noise=False)
    terms, *_ = estimated(episode)
    for name in ("turn", "wobble", "effort", "jerk", "pose", "limits"):
        assert [t[name] for t in terms] == pytest.approx(
            [t[name] for t in episode.terms], abs=2e-6
        ), name
    for name, least in (("track", 0.7), ("swing", 0.95), ("slip", 0.8), ("tilt", 0.8)):
        pair = np.array([[t[name] for t in terms], [t[name] for t in episode.terms]])
        assert np.corrcoef(pair)[0, 1] > least, name
        assert abs(pair[0].mean() - pair[1].mean()) < 0.06, name


@pytest.mark.parametrize(("noise", "rms", "bias"), [(False, 0.08, 0.04), (True, 0.12, 0.05)])
def test_the_trunks_velocity_is_known_on_a_walk(noise: bool, rms: float, bias: float) -> None:
    episode = walk(noise)
    _, _, velocity, _ = estimated(episode)
    off = (np.stack(velocity) - np.stack(episode.velocity))[25:, :2]
    assert np.abs(np.stack(episode.velocity)[25:, 0]).mean() > 0.3  # it does walk
    assert np.sqrt(np.square(off).mean(0)).max() < rms
    assert np.abs(off.mean(0)).max() < bias


def test_rewards_with_noise_are_close_enough_to_adapt_by() -> None:
    episode = walk(noise=True)
    _, rewards, _, _ = estimated(episode)
    assert abs(np.mean(rewards) - np.mean(episode.rewards)) < 0.2
    assert WEIGHTS.keys() == episode.terms[0].keys()


def test_a_reading_updates_the_odometry_once_whichever_method_gets_it_first() -> None:
    episode = walk(noise=True)
    _, rewards, _, _ = estimated(episode)
    layout, seen = LeggedLayout(meta()), []
    for (before, after), (last, action) in zip(
        itertools.pairwise(episode.readings), itertools.pairwise(episode.actions), strict=True
    ):
        layout.observe(before, last)
        layout.ended(after)
        layout.observe(after, action)
        seen.append(layout.reward(before, after, action, last))
    assert seen == rewards
    layout.begin()  # another episode: the first again
    assert (
        layout.reward(*episode.readings[:2], episode.actions[1], episode.actions[0]) == rewards[0]
    )


def test_a_fall_is_seen_where_the_simulator_sees_it() -> None:
    robot = SimulatedRobot(FAMILY, FAMILY.space.sample("test", 1), noise=False)
    layout, seq = LeggedLayout(meta()), 1
    robot.damp()
    while not robot.over:
        assert not layout.ended(reading_of(robot, seq))
        robot.advance(FAMILY.substeps)
        seq += 1
    assert robot.terminated
    assert (
        layout.ended(reading_of(robot, seq))
        or layout._update(reading_of(robot, seq)).motion.depth < 0.19
    )


def test_commands_come_from_the_operator_or_with_the_reading() -> None:
    reading = walk(noise=False).readings[0]
    layout = LeggedLayout(meta(), command=(9.0, 8.0, 7.0))
    assert layout.observe(reading, np.zeros(12))[-3:] == pytest.approx(
        [reading[k] for k in ("command.x", "command.y", "command.turn")]
    )
    own = {k: v for k, v in reading.items() if not k.startswith("command")}
    layout.begin()
    assert layout.observe(own, np.zeros(12))[-3:].tolist() == [9.0, 8.0, 7.0]
    hidden = LeggedLayout(meta(command_names=()), command=(9.0, 8.0, 7.0))
    assert hidden.observe(own, np.zeros(12))[-3:].tolist() == [0.0, 0.0, 0.0]


def test_a_reward_in_the_reading_takes_precedence() -> None:
    episode = walk(noise=False)
    told = episode.readings[1] | {"reward": 1.25}
    assert (
        LeggedLayout(meta()).reward(
            episode.readings[0], told, episode.actions[1], episode.actions[0]
        )
        == 1.25
    )


def test_what_it_needs_is_what_the_robot_gives() -> None:
    needed = LeggedLayout(meta()).needed()
    assert set(needed) <= set(walk(noise=False).readings[0])
    assert {"stamp", "seq", *QUAT, *GYRO, "FR_hip.pos", "RL_calf.tau", "RR.force"} <= set(needed)


def test_a_policy_without_rules_for_a_reward_is_refused() -> None:
    for rules in (None, {"kind": "crab"}):
        with pytest.raises(BridgeError, match="no quadruped's reward"):
            LeggedLayout(meta(reward=rules))


def test_standing_still_is_standing_still() -> None:
    odometry = LegOdometry(FAMILY.deployment.hardware().reward["legs"], 0.022)
    angles, still, nothing = (
        go2.DEFAULT_POSE.reshape(4, 3).tolist(),
        [[0.0] * 3] * 4,
        (0.0, 0.0, 0.0),
    )
    for _ in range(10):
        motion = odometry.update(angles, still, (0.0, 0.0, 1.0), nothing, [True] * 4, 0.02)
    assert motion.velocity == pytest.approx(np.zeros(3))
    assert motion.speed == pytest.approx(np.zeros(4))
    assert motion.depth == pytest.approx(go2.STANDING_HEIGHT, abs=0.05)
    assert min(motion.height) == 0.0


def test_direct_layouts_take_observations_by_name() -> None:
    about: Any = SimpleNamespace(
        observation_names=("a_m", "b_m"), action=SimpleNamespace(names=("x", "y"))
    )
    layout = NamedSignalsLayout(about)
    reading = {"stamp": 0.0, "seq": 1.0, "b_m": 2.0, "a_m": 1.0, "reward": 3.0, "terminated": 1.0}
    assert layout.needed() == ("stamp", "seq", "a_m", "b_m")
    assert layout.observe(reading, np.zeros(2)).tolist() == [1.0, 2.0]
    assert layout.observe(reading, np.zeros(2)).dtype == np.float32
    assert layout.targets(np.array([0.5, -1.0])) == {"x": 0.5, "y": -1.0}
    assert layout.reward(reading, reading, np.zeros(2), np.zeros(2)) == 3.0
    assert layout.ended(reading)
    assert not layout.ended({"stamp": 0.0, "seq": 1.0})
    assert layout.reward({}, {}, np.zeros(2), np.zeros(2)) == 0.0
