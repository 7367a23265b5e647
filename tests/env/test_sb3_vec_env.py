"""Stable-Baselines3 trains over the batch, and its bookkeeping is right."""

import warnings

import gymnasium
import numpy as np
import pytest

from metarobot.env.gymnasium_envs import GymVecEnv
from metarobot.errors import MetarobotError
from metarobot.tasks.family import families

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from metarobot.env.sb3_vec_env import SB3VecEnv

TUMBLER = families.get("CheetahVel").replace(
    horizon=12, terminate=lambda state: state.qpos[:, 2].abs() > 0.12
)
SHORT = TUMBLER.replace(terminate=None)


@pytest.mark.parametrize("name", families.names())
def test_every_family_passes_sb3s_checker(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "We recommend you to use a symmetric and normalized Box action space"
        )
        check_env(gymnasium.make(f"metarobot/{name}-v0").unwrapped)


def test_it_lives_what_gymnasiums_vector_environment_lives():
    ours, theirs = SB3VecEnv(TUMBLER, 4), GymVecEnv(TUMBLER, 4)
    ours.seed(3)
    a, (b, infos) = ours.reset(), theirs.reset(seed=3)
    assert np.array_equal(a, b)
    assert [i["task"]["target_speed"] for i in ours.reset_infos] == infos["task"][
        "target_speed"
    ].tolist()
    returns, lengths, ended = np.zeros(4), np.zeros(4, int), 0
    theirs.action_space.seed(0)
    for _ in range(30):
        action = theirs.action_space.sample()
        (a, r, done, ours_infos), (b, s, terminated, truncated, infos) = (
            ours.step(action),
            theirs.step(action),
        )
        assert np.array_equal(a, b)
        assert np.array_equal(r, s)
        assert np.array_equal(done, terminated | truncated)
        returns, lengths = returns + r, lengths + 1
        for i, info in enumerate(ours_infos):
            assert ("terminal_observation" in info) == ("episode" in info) == done[i]
            if done[i]:
                ended += 1
                assert np.array_equal(info["terminal_observation"], infos["final_obs"][i])
                assert info["TimeLimit.truncated"] == truncated[i]
                assert (
                    info["task"]["target_speed"] == infos["final_info"]["task"]["target_speed"][i]
                )
                assert info["episode"]["l"] == lengths[i]
                assert info["episode"]["r"] == pytest.approx(returns[i])
                returns[i] = lengths[i] = 0
    assert ended >= 8


def test_options_give_tasks_and_seeds_repeat():
    env = SB3VecEnv(SHORT, 3, resample=False)
    tasks = [{"target_speed": s} for s in (0.5, 1.0, 1.5)]
    env.set_options([{"task": t} for t in tasks])
    env.reset()
    for _ in range(13):
        _, _, _, infos = env.step(np.zeros((3, 6)))
    assert [i["task"] for i in infos] == env.get_attr("task") == tasks
    assert env.get_attr("task", [2]) == [tasks[2]]
    env.reset()
    assert env.get_attr("task") != tasks
    env.seed(1)
    once = env.reset()
    assert not np.array_equal(once, env.reset())
    env.seed(1)
    assert np.array_equal(once, env.reset())


def test_rows_of_a_batch_say_what_they_cannot_do():
    env = SB3VecEnv(SHORT, 2)
    assert env.get_attr("render_mode") == [None, None]
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(gymnasium.wrappers.TimeLimit, 0) == [False]
    assert not env.has_attr("no_such_thing")
    for refused in (lambda: env.env_method("step"), lambda: env.set_attr("x", 1), env.get_images):
        with pytest.raises(MetarobotError):
            refused()
    env.set_options({"tusk": 1})
    with pytest.raises(MetarobotError, match="no option 'tusk'"):
        env.reset()


def test_ppo_trains_and_logs():
    def learn():
        env = SB3VecEnv(SHORT, 8)
        model = PPO("MlpPolicy", env, n_steps=24, batch_size=96, n_epochs=2, seed=0, device="cpu")
        before = [p.detach().clone() for p in model.policy.parameters()]
        model.learn(8 * 24 * 2)
        assert any(not p.equal(q) for p, q in zip(model.policy.parameters(), before, strict=True))
        return model

    model = learn()
    assert model.num_timesteps == 8 * 24 * 2
    episodes = list(model.ep_info_buffer)
    assert len(episodes) == 8 * 4
    assert {e["l"] for e in episodes} == {12}
    assert [e["r"] for e in episodes] == [e["r"] for e in learn().ep_info_buffer]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, _ = evaluate_policy(model, SB3VecEnv(SHORT, 4, split="test"), n_eval_episodes=8)
    assert np.isfinite(mean)
