from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from metarobot.env.base import Env
from metarobot.evaluation.trial_film import film
from metarobot.learning.agent_interface import Agent, Dimensions, agents
from metarobot.render.camera import Camera, snapshot_state
from metarobot.render.film import VideoError
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Task

PANEL = (160, 120)


@pytest.fixture(scope="module")
def family() -> Family:
    return replace(families.get("CheetahVel"), horizon=10)


@pytest.fixture(scope="module")
def agent() -> Agent:
    torch.manual_seed(0)
    kind = agents.get("rl2")
    made: Agent = kind.build(kind.config(), Dimensions(obs=17, act=6, task=1, episodes=2)).agent
    return made


@pytest.fixture(scope="module")
def mp4(gl: None, family: Family, agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("film") / "two.mp4"
    tasks = [family.space.task(target_speed=v) for v in (0.5, 2.5)]
    return film(agent, family, tasks, out=out, episodes=2, seed=1, size=PANEL, progress=False)


def terrain(**values: float) -> tuple[Family, Task]:
    family = families.get("CheetahTerrain")
    nominal = {p.name: 1.0 for p in family.space.params}
    return family, family.space.task(**{**nominal, "slope": 0.0, **values})


def picture(family: Family, task: Task) -> np.ndarray:
    env = Env(family, [task], seed=3, threads=1)
    with Camera(family, 320, 240) as camera:
        return camera.frame(env, 0)


def test_an_mp4_holds_every_panel_at_the_control_rate(mp4: Path) -> None:
    frames, about = iio.imread(mp4), iio.immeta(mp4)
    assert about["fps"] == pytest.approx(20)
    assert len(frames) == 10 + 24  # the last moment is held for 1.2 s
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    assert frames.shape[1] > 2 * PANEL[1]
    assert frames.shape[2] > 2 * PANEL[0]
    assert [p.name for p in mp4.parent.iterdir()] == [mp4.name]


def test_frames_move_and_carry_words(mp4: Path) -> None:
    frames = iio.imread(mp4).astype(int)
    assert all(np.abs(a - b).max() > 40 for a, b in itertools.pairwise(frames[:10]))
    assert np.abs(frames[12] - frames[-1]).max() < 30
    title = frames[0][: PANEL[1] // 8, : PANEL[0]]
    assert title.min() < 80
    assert title.max() > 230


def test_episodes_of_one_task_and_tasks_differ(mp4: Path) -> None:
    frame = iio.imread(mp4)[9].astype(int)
    left, right = frame[:, : frame.shape[1] // 2], frame[:, frame.shape[1] // 2 :]
    assert np.abs(left - right).mean() > 1
    rows = frame.shape[0] // 2
    assert np.abs(frame[:rows] - frame[-rows:]).mean() > 1


def test_a_gif_plays_and_is_small(gl: None, family: Family, agent: Agent, tmp_path: Path) -> None:
    out = tmp_path / "one.gif"
    task = family.space.task(target_speed=1.0)
    film(
        agent, family, [task], out=out, episodes=1, seed=0, size=PANEL, title="Mine", progress=False
    )
    frames = iio.imread(out)
    assert frames.ndim == 4
    assert np.abs(frames[0].astype(int) - frames[4]).max() > 40
    assert out.stat().st_size < 500_000
    assert [p.name for p in tmp_path.iterdir()] == ["one.gif"]


def test_the_same_seed_films_the_same(
    gl: None, family: Family, agent: Agent, tmp_path: Path
) -> None:
    task = family.space.task(target_speed=1.0)
    films = [tmp_path / f"{i}.mp4" for i in range(2)]
    for out in films:
        film(agent, family, [task], out=out, episodes=1, seed=0, size=PANEL, progress=False)
    np.testing.assert_array_equal(*(iio.imread(out) for out in films))


def test_an_episode_that_ends_early_keeps_its_last_moment(
    gl: None, family: Family, agent: Agent, tmp_path: Path
) -> None:
    mortal = family.replace(terminate=lambda state: torch.ones(len(state.qpos), dtype=torch.bool))
    out = tmp_path / "short.mp4"
    task = family.space.task(target_speed=1.0)
    film(agent, mortal, [task], out=out, episodes=2, seed=0, size=PANEL, progress=False)
    assert len(iio.imread(out)) == 1 + 24


def test_a_picture_is_of_the_world_as_it_is(gl: None, family: Family) -> None:
    env = Env(family, [family.space.task(target_speed=v) for v in (0.0, 1.0)], threads=1)
    with Camera(family, 96, 64) as camera:
        first = camera.frame(env, 0)
        assert first.shape == (64, 96, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, camera.frame(env, 0))
        assert (first != camera.frame(env, 1)).any()
        env.step(torch.ones(2, 6))
        assert (first != camera.frame(env, 0)).any()


def test_drawing_leaves_the_world_as_it_was(gl: None, family: Family) -> None:
    task = family.space.task(target_speed=1.0)
    drawn, other = (Env(family, [task], seed=5, threads=1) for _ in range(2))
    with Camera(family, 32, 24) as camera:
        for _ in range(5):
            camera.frame(drawn, 0)
            a, b = (env.step(torch.full((1, 6), 0.3)) for env in (drawn, other))
            assert torch.equal(a.obs, b.obs)


def test_the_floor_is_under_a_robot_that_was_far_away_in_the_last_picture(
    gl: None, family: Family
) -> None:
    env = Env(family, [family.space.task(target_speed=0.0)], seed=5, threads=1)
    here = snapshot_state(env, 0)
    far = here.copy()
    far[1] += 100.0  # time, then the position along the track (m)
    task = env.tasks[0]
    with Camera(family, 96, 64) as camera:
        alone = camera.picture(task, here, key="here")
        camera.picture(task, far, key="far")
        np.testing.assert_array_equal(alone, camera.picture(task, here, key="here"))


def horizon(image: np.ndarray) -> tuple[int, int]:
    """Rows at which the floor begins, at the left and right edges."""
    dark = image.sum(2) < 3 * 175
    below = np.arange(len(image)) > 0.18 * len(image)
    return tuple(int(np.argmax(dark[:, c] & below)) for c in (2, -3))  # type: ignore[return-value]


def test_uphill_is_seen_uphill(gl: None) -> None:
    for slope in (-5.0, 0.0, 5.0):
        left, right = horizon(picture(*terrain(slope=slope)))
        rise = np.degrees(np.arctan2(left - right, 315))
        assert rise == pytest.approx(slope, abs=2.5)


def test_stages_of_several_tasks_do_not_mix(gl: None) -> None:
    family, up = terrain(slope=5.0)
    _, down = terrain(slope=-5.0)
    env = Env(family, [up, down], seed=0, threads=1)
    with Camera(family, 320, 240) as camera:
        for _ in range(2):
            pictures = [camera.frame(env, w) for w in (0, 1)]
            rises = [left - right for left, right in map(horizon, pictures)]
            assert rises[0] > 0 > rises[1]


def test_a_task_is_told_with_its_units() -> None:
    family, task = terrain(slope=-5.0, payload=2.5)
    told = family.space.describe_task(task)
    assert "slope −5 deg" in told
    assert "payload 2.5 kg" in told


def test_an_unknown_suffix_lists_the_known(family: Family, agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"\.mp4, \.gif"):
        film(agent, family, [], out=tmp_path / "film.avi", episodes=1, seed=0)


def test_a_folder_that_is_not_there_is_named(family: Family, agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="nowhere"):
        film(agent, family, [], out=tmp_path / "nowhere" / "film.mp4", episodes=1, seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(
    family: Family, agent: Agent, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(VideoError, match=tmp_path.name):
        film(agent, family, [], out=tmp_path / "film.mp4", episodes=1, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a folder that nobody, not even root, can write"
)
def test_a_folder_that_cannot_be_written_is_named(gl: None, family: Family, agent: Agent) -> None:
    with pytest.raises(VideoError, match="/proc"):
        film(
            agent,
            family,
            family.space.sample("test", 1),
            out=Path("/proc/x.mp4"),
            episodes=1,
            seed=0,
            progress=False,
        )


def test_a_film_that_breaks_off_leaves_nothing(
    gl: None, family: Family, agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Camera, "picture", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        film(
            agent,
            family,
            family.space.sample("test", 1),
            out=tmp_path / "x.mp4",
            episodes=1,
            seed=0,
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_without_opengl_one_line_says_what_to_install() -> None:
    code = (
        "from metarobot.env.base import families\n"
        "from metarobot.render.film import Camera, VideoError\n"
        "try: Camera(families.get('CheetahVel'))\n"
        "except VideoError as e: print(e)"
    )
    environment = {**os.environ, "MUJOCO_GL": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "apt-get install libegl1" in done.stdout
    assert "MUJOCO_GL=disabled" in done.stdout
