"""Evaluations and films run on MuJoCo Warp as they do on the CPU."""

from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest

pytest.importorskip("mujoco_warp")

from metarobot.evaluation.compare import protocol_key
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import Protocol
from metarobot.evaluation.trial_film import film
from metarobot.training.run_folder import Run, open_run

ON_WARP = {"sim": "warp", "device": "cpu"}


@pytest.fixture(scope="module")
def run() -> Run:
    """A trained agent with episodes of 3 steps: Warp is slow on a CPU."""
    trained = open_run("CheetahDir-blind")
    return replace(trained, family=replace(trained.family, horizon=3))


def test_an_evaluation_on_warp_has_the_same_report_as_on_the_cpu(run: Run) -> None:
    on_cpu = evaluate([run], Protocol(tasks=2, threads=1), controls=True)
    on_warp = evaluate([run], Protocol(tasks=2, **ON_WARP), controls=True)
    assert on_warp.keys() == on_cpu.keys()
    assert on_warp["task_values"] == on_cpu["task_values"]
    # starts are drawn otherwise, so returns are only of the same size
    assert on_warp["returns"] != on_cpu["returns"]
    for here, there in zip(on_warp["episodes"], on_cpu["episodes"], strict=True):
        assert here["mean"] == pytest.approx(there["mean"], abs=1.0)


def test_a_film_on_warp_shows_the_same_panels(gl: None, run: Run, tmp_path: Path) -> None:
    tasks = run.family.space.sample("test", 2, 0)
    frames = []
    for name, where in (("cpu.mp4", {}), ("warp.mp4", ON_WARP)):
        out = tmp_path / name
        film(
            run.load_agent(),
            run.family,
            tasks,
            out=out,
            episodes=1,
            seed=0,
            size=(96, 64),
            progress=False,
            **where,
        )
        frames.append(iio.imread(out))
    assert frames[0].shape == frames[1].shape


def test_returns_that_were_kept_for_the_cpu_stay_valid_and_warp_has_its_own() -> None:
    key = {"split": "test", "tasks": 40, "episodes": 2, "seed": 0, "quiet": False}
    assert protocol_key(Protocol(threads=3)) == key
    assert protocol_key(Protocol(**ON_WARP)) == {**key, **ON_WARP}
