"""Gymnasium's promises, kept by every family."""

import subprocess
import sys
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import metarobot
from metarobot.env.gymnasium_envs import GymEnv, GymVecEnv, register
from metarobot.errors import MetarobotError
from metarobot.render.camera import Camera
from metarobot.render.film import VideoError
from metarobot.tasks.distributions import TaskError
from metarobot.tasks.family import families

TERRAIN = replace(families.get("CheetahTerrain"), horizon=12)
TUMBLER = families.get("CheetahVel").replace(
    horizon=12, terminate=lambda state: state.qpos[:, 2].abs() > 0.12
)
"""Ends at another step in each world, by failure or by time."""


def actions_for(env, steps, seed=0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(steps)]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, np.ndarray) and a.dtype == object:
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", families.names())
def test_every_family_passes_gymnasiums_checker(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gymnasium.make(f"metarobot/{name}-v0").unwrapped, skip_render_check=True)
    # observations have no bounds, and a quadruped's actions others than 1
    usual = ("infinity", "symmetric and normalized")
    assert all(any(u in str(w.message) for u in usual) for w in caught), [
        str(w.message) for w in caught
    ]


@pytest.mark.parametrize("name", families.names())
def test_every_family_has_an_id_for_one_world_and_for_many(name):
    gymnasium.register_envs(metarobot)
    family = families.get(name)
    env, many = (
        gymnasium.make(f"metarobot:metarobot/{name}-v0"),
        gymnasium.make_vec(f"metarobot/{name}-v0", num_envs=4),
    )
    assert isinstance(env.unwrapped, GymEnv)
    assert isinstance(many, GymVecEnv)
    for e in (env, many):
        obs, _ = e.reset(seed=0)
        assert obs in e.observation_space
        assert e.observation_space.dtype == e.action_space.dtype == obs.dtype == np.float32
        assert e.metadata["render_fps"] == round(env.unwrapped.env.control_hz)
    assert many.observation_space.shape == (4, len(family.observations))


def test_import_is_light_and_registers():
    code = """
import sys, metarobot, gymnasium
assert not {"torch", "mujoco"} & set(sys.modules)
assert "metarobot/CheetahVel-v0" in gymnasium.registry
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_family_registered_at_run_time_gets_its_id_too():
    families.register("GymTestTumbler", replace(TUMBLER, name="GymTestTumbler"))
    try:
        register()
        assert gymnasium.make("metarobot/GymTestTumbler-v0").reset(seed=0)
    finally:
        del families._items["GymTestTumbler"], gymnasium.registry["metarobot/GymTestTumbler-v0"]


def test_the_task_is_an_option_and_is_told():
    env, task = GymEnv(TUMBLER), {"target_speed": 1.25}
    _, info = env.reset(seed=0, options={"task": task})
    assert info["task"] == task
    _, reward, _, _, info = env.step(actions_for(env, 1)[0])
    assert info["task"] == task
    assert not info["faulted"]
    assert reward == pytest.approx(
        sum(w * info["reward_terms"][k] for k, w in TUMBLER.weights.items())
    )
    _, info = env.reset(options={"task": TUMBLER.space.task(**task)})
    assert info["task"] == task
    _, info = env.reset()
    assert info["task"] != task


def test_the_task_changes_what_happens():
    env, finals = GymEnv(TERRAIN), []
    for slope in (-5, 5):
        task = {**TERRAIN.space.sample("train", 1)[0].as_dict(), "slope": slope}
        env.reset(seed=0, options={"task": task})
        finals.append([env.step(a)[0] for a in actions_for(env, 5)][-1])
    assert not np.array_equal(*finals)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tusk": {}}, "no option 'tusk'.*task"),
        ({"task": {"target_sped": 1.0}}, "no parameter 'target_sped'; it has: target_speed"),
        ({"task": {"target_speed": 99.0}}, "outside its bounds"),
        ({"task": {}}, "needs a value"),
        ({"task": {1: 2.0}}, "maps target_speed"),
        ({"task": 3.0}, "3.0"),
        ({"task": TERRAIN.space.sample("train", 1)[0]}, "that is a task of CheetahTerrain"),
    ],
)
@pytest.mark.parametrize("make", [GymEnv, lambda family: GymVecEnv(family, 2)])
def test_mistakes_in_options_are_told_in_one_line(make, options, match):
    with pytest.raises(MetarobotError, match=match) as e:
        make(TUMBLER).reset(options=options)
    assert "\n" not in str(e.value)


def test_other_mistakes_are_told():
    with pytest.raises(TaskError, match="no split 'tests'"):
        GymEnv("CheetahVel", split="tests")
    with pytest.raises(MetarobotError, match="no family"):
        GymEnv("CheetahWell")
    with pytest.raises(MetarobotError, match="render mode"):
        GymEnv("CheetahVel", render_mode="ansi")
    env = GymEnv("CheetahVel")
    env.reset()
    with pytest.raises(MetarobotError, match=r"shape \(6,\), not \(5,\)"):
        env.step(np.zeros(5))
    many = GymVecEnv(TUMBLER, 3)
    with pytest.raises(ResetNeeded):
        many.step(np.zeros((3, 6)))
    with pytest.raises(TaskError, match="3 worlds take one"):
        many.reset(options={"task": [{"target_speed": 1.0}] * 2})


def test_a_human_needs_a_display(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MetarobotError, match="display"):
        GymEnv("CheetahVel", render_mode="human")


def test_tasks_and_starts_are_drawn_reproducibly():
    def live(seed):
        env = GymEnv(TERRAIN)
        first = env.reset(seed=seed)
        return [first, *(env.reset() for _ in range(3))]

    one, again, other = live(3), live(3), live(4)
    for (obs, info), (obs2, info2) in zip(one, again, strict=True):
        assert_same(obs, obs2)
        assert info == info2
    assert len({str(info) for _, info in one + other}) == 8


def test_the_test_split_of_a_finite_space_is_drawn_at_random():
    env = GymEnv("CheetahDir", split="test")
    env.reset(seed=0)
    assert {env.reset()[1]["task"]["direction"] for _ in range(20)} == {-1.0, 1.0}


def test_an_episode_ends_with_its_last_observation_and_needs_a_reset():
    env = GymEnv(TUMBLER.replace(terminate=None))
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(6))
    obs, _ = env.reset(seed=0)
    for t, action in enumerate(actions_for(env, 12)):
        last, (obs, _, terminated, truncated, _) = obs, env.step(action)
        assert (terminated, truncated) == (False, t == 11)
    # positions moved by less than a step's worth: no reset hides in between
    assert np.abs(obs[:8] - last[:8]).max() < 2.0
    # the world stays there until the reset
    assert np.array_equal(obs, env.env.family.observe(env.env.state)[0].numpy())
    assert env.env.elapsed.tolist() == [12]
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(np.zeros(6))


@pytest.mark.parametrize("family", [TERRAIN, TUMBLER], ids=["terrain", "tumbler"])
def test_each_world_of_many_lives_as_one_alone(family):
    many = GymVecEnv(family, 3, threads=1)
    obs, infos = many.reset(seed=5)
    singles = [GymEnv(family) for _ in range(3)]
    ended = 0

    def put(i):
        task = {k: float(v[i]) for k, v in infos["task"].items() if k[0] != "_"}
        singles[i].reset(options={"task": task})
        sim = many.env.sim
        singles[i].env.set_state(
            sim.bind("qpos")[i : i + 1].clone(), sim.bind("qvel")[i : i + 1].clone()
        )

    for i in range(3):
        put(i)
    for action in actions_for(many, 30):
        obs, reward, terminated, truncated, infos = many.step(action)
        assert reward.dtype == obs.dtype == np.float32
        for i, single in enumerate(singles):
            o, r, te, tr, info = single.step(action[i])
            assert (te, tr) == (terminated[i], truncated[i])
            assert np.float32(r) == reward[i]
            terms = {k: v[i] for k, v in infos["reward_terms"].items() if k[0] != "_"}
            assert info["reward_terms"] == terms
            if te or tr:
                ended += 1
                assert_same(infos["final_obs"][i], o)
                final = infos["final_info"]
                assert info["task"] == {k: v[i] for k, v in final["task"].items() if k[0] != "_"}
                put(i)
            else:
                assert_same(obs[i], o)
                assert "final_obs" not in infos or infos["final_obs"][i] is None
    assert ended >= 6


def test_infos_have_the_layout_of_gymnasiums_own_vector_environment():
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    ours = GymVecEnv(TUMBLER, 6)
    theirs = gymnasium.vector.SyncVectorEnv([lambda: GymEnv(TUMBLER)] * 6, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode

    def layout(info):
        return {
            k: layout(v) if isinstance(v, dict) else (v.dtype, v.shape)
            for k, v in sorted(info.items())
        }

    def some_end(env):
        env.reset(seed=1)
        for action in actions_for(env, 12):
            _, _, terminated, truncated, infos = env.step(action)
            done = terminated | truncated
            if done.any() and not done.all():
                assert np.array_equal(infos["_final_obs"], done)
                assert np.array_equal(infos["_final_info"], done)
                assert np.array_equal(infos["final_info"]["_task"], done)
                assert all(
                    (o is not None) == d for o, d in zip(infos["final_obs"], done, strict=True)
                )
                return layout(infos)
        raise AssertionError("no step in which some worlds ended")

    assert layout(ours.reset(seed=0)[1]) == layout(theirs.reset(seed=0)[1])
    assert some_end(ours) == some_end(theirs)


def test_many_worlds_repeat_with_their_seed_and_do_not_meddle_with_each_other():
    def live(seed, worlds, steps=30):
        env = GymVecEnv(TUMBLER, worlds)
        obs, infos = env.reset(seed=seed)
        path = [(obs, infos["task"]["target_speed"])]
        for action in actions_for(GymVecEnv(TUMBLER, 4), steps):
            obs, *_, infos = env.step(action[:worlds])
            path.append((obs, infos["task"]["target_speed"]))
        return path

    for (a, t), (b, u), (c, v) in zip(live(7, 4), live(7, 4), live(7, 2), strict=True):
        assert_same(a, b)
        assert np.array_equal(t, u)
        assert_same(a[:2], c)
        assert np.array_equal(t[:2], v)
    assert not np.array_equal(live(7, 2, 1)[0][0], live(8, 2, 1)[0][0])


def test_tasks_change_at_the_autoreset_or_stay():
    task = {"target_speed": 1.0}
    env = GymVecEnv(TUMBLER, 3)
    for options, stays in (
        ({"task": task}, False),
        ({"task": [task] * 3, "resample": False}, True),
        (None, False),
    ):
        _, infos = env.reset(seed=0, options=options)
        first = infos["task"]["target_speed"]
        assert (options is None) or (first == 1.0).all()
        for action in actions_for(env, 12):
            *_, infos = env.step(action)
        assert np.array_equal(first, infos["task"]["target_speed"]) == stays


def test_wrappers_of_gymnasium_see_whole_episodes():
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        GymVecEnv(TUMBLER.replace(terminate=None), 3)
    )
    env.reset(seed=0)
    total = np.zeros(3)
    for action in actions_for(env, 12):
        _, reward, *_, infos = env.step(action)
        total += reward
    assert np.allclose(infos["episode"]["r"], total)
    assert (infos["episode"]["l"] == 12).all()


@pytest.fixture
def can_draw():
    try:
        Camera(TUMBLER, 32, 32).close()
    except VideoError as e:
        pytest.skip(str(e))


@pytest.mark.usefixtures("can_draw")
def test_pictures_show_the_task_and_the_end_of_the_episode():
    env = GymEnv(TERRAIN.replace(terminate=None), render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    first = env.render()
    assert (first.shape, first.dtype) == ((48, 64, 3), np.uint8)
    for action in actions_for(env, 12):
        env.step(action)
    last = env.render()
    assert np.array_equal(last, env.render())
    env.reset()
    assert not np.array_equal(last, env.render())
    env.close()
    env.close()
    many = GymVecEnv(TERRAIN, 2, render_mode="rgb_array", width=64, height=48)
    many.reset(seed=0)
    assert [f.shape for f in many.render()] == [(48, 64, 3)] * 2
    many.close()
