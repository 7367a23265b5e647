"""What is built on an environment runs on every simulator: here on Warp, on its CPU device."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.env.factory import make_env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.types import Percept, Rollout

pytest.importorskip("mujoco_warp")
FAMILY = families.get("CheetahVel").replace(
    horizon=6, terminate=lambda state: state.qpos[:, 2].abs() > 0.12
)
"""Ends at another step in each world, by failure or by time."""
WARP = {"sim": "warp", "device": "cpu"}


def tasks(worlds: int = 3):
    return FAMILY.space.sample("train", worlds, 0)


def device_env(worlds: int = 3, seed: int = 0) -> Env:
    return make_env(FAMILY, tasks(worlds), seed=seed, **WARP)


def actions(steps: int, worlds: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(steps, worlds, 6, generator=generator) - 1


class Waves:
    privileged = explores = False

    def begin(self, worlds: int, task: torch.Tensor | None = None) -> Context:
        return ()

    def act(self, percept: Percept, context: Context, noise: torch.Tensor | None = None):
        action = torch.sin(5 * percept.obs[:, :6])
        return (action if noise is None else action + noise), context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        return context


def test_worlds_that_are_over_wait_and_are_restarted_alone() -> None:
    env, untouched = device_env(), device_env()
    for action in actions(8):
        waiting = env.over.clone()
        step = env.step(action)
        assert not ((step.terminated | step.truncated | step.faulted) & waiting).any()
    assert env.over.all()
    obs = env.restart_worlds([1])
    assert env.over.tolist() == [True, False, True]
    assert env.elapsed[1] == 0
    assert env.episodes.tolist() == [0, 1, 0]
    assert torch.equal(obs[1], FAMILY.observe(env.state)[1])
    assert torch.equal(env.restart(4), untouched.restart(4))


def test_a_reset_without_a_seed_starts_the_next_episode_on_both() -> None:
    for env in (device_env(), Env(FAMILY, tasks(), threads=1)):
        first, second = env.reset(3), env.reset()
        assert env.episodes.tolist() == [1, 1, 1]
        assert not torch.equal(first, second)
        assert torch.equal(second, env.restart(1))
        assert torch.equal(first, env.reset(3))


def test_collecting_gives_the_same_bits_again() -> None:
    env = device_env()
    first, again, other = (
        collect(Waves(), env, tasks(), episodes=2, seed=seed) for seed in (1, 1, 2)
    )
    for a, b, c in zip(first.episodes, again.episodes, other.episodes, strict=True):
        assert torch.equal(a.valid, b.valid)
        assert torch.equal(a.obs[a.valid], b.obs[b.valid])
        assert not torch.equal(a.obs[0], c.obs[0])
        ended = a.terminated | a.truncated
        assert (ended.sum(0) == 1).all()
        assert a.obs[a.valid].isfinite().all()
    assert first.faults() == 0


def test_autoreset_starts_the_next_episode_on_the_next_task() -> None:
    env, pool = device_env(2), tasks(20)
    stepped = AutoresetEnv(env, next_task=lambda world, episode: pool[2 * episode + world])
    stepped.reset(0)
    for action in actions(20, 2):
        step = stepped.step(action)
        ended = step.terminated | step.truncated
        assert torch.equal(ended, env.elapsed == 0)
        assert torch.equal(step.obs[~ended], step.final_obs[~ended])
        assert (step.obs[ended] != step.final_obs[ended]).any(1).all()
        assert env.tasks == [pool[2 * int(k) + i] for i, k in enumerate(env.episodes)]
        assert step.obs.isfinite().all()
    assert env.episodes.min() >= 3


def test_gymnasiums_environments_run_on_warp() -> None:
    from metarobot.env.gymnasium_envs import GymEnv, GymVecEnv

    single, many = GymEnv(FAMILY, **WARP), GymVecEnv(FAMILY, 3, **WARP)
    obs, info = single.reset(seed=0, options={"task": {"target_speed": 1.0}})
    assert obs in single.observation_space
    assert info["task"] == {"target_speed": 1.0}
    steps = 0
    terminated = truncated = False
    while not (terminated or truncated):
        obs, reward, terminated, truncated, info = single.step(np.full(6, 0.5, np.float32))
        assert obs in single.observation_space
        assert isinstance(reward, float)
        steps += 1
    assert steps <= 6
    obs, infos = many.reset(seed=0)
    assert obs.shape == (3, 17)
    assert infos["task"]["target_speed"].dtype == np.float64
    ended = np.zeros(3, int)
    for action in actions(20):
        obs, reward, terminated, truncated, infos = many.step(action.numpy())
        assert obs.dtype == reward.dtype == np.float32
        assert np.isfinite(obs).all()
        ended += terminated | truncated
    assert ended.min() >= 3


def test_sb3s_environment_runs_on_warp() -> None:
    pytest.importorskip("stable_baselines3")
    from metarobot.env.sb3_vec_env import SB3VecEnv

    env = SB3VecEnv(FAMILY, 3, **WARP)
    assert env.reset().shape == (3, 17)
    episodes = []
    for action in actions(20):
        obs, reward, done, infos = env.step(action.numpy())
        assert np.isfinite(obs).all()
        assert reward.shape == (3,)
        episodes += [infos[i]["episode"] for i in np.flatnonzero(done)]
        assert all("terminal_observation" in infos[i] for i in np.flatnonzero(done))
    assert len(episodes) >= 9
    assert all(1 <= episode["l"] <= 6 for episode in episodes)


def test_sensors_are_current_where_worlds_are_restarted_alone() -> None:
    family = replace(families.get("QuadrupedFlat"), horizon=4)
    env = make_env(family, family.space.sample("train", 3, 0), **WARP)
    env.step(torch.zeros(3, 12))
    before = env.state.sensors.clone()
    env.restart_worlds([1])
    assert torch.equal(env.state.sensors[[0, 2]], before[[0, 2]])
    qpos, qvel = env.state.qpos.clone(), env.state.qvel.clone()
    alone = env.state.sensors[1].clone()
    env.set_state(qpos, qvel)
    assert torch.equal(env.state.sensors[1], alone)
    assert not torch.equal(alone, before[1])


@pytest.mark.parametrize("sim", ["", "bullet"])
def test_an_unknown_simulator_is_refused(sim: str) -> None:
    with pytest.raises(MetarobotError, match=r"no simulator called .*; there are: cpu, warp"):
        make_env(FAMILY, tasks(), sim=sim)
