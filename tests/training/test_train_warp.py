"""Meta-training on MuJoCo Warp, on its CPU device: what a GPU would do, at a tiny size."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run

from metarobot.env.factory import SIMS, choose_simulator
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.optimiser_state import move_to_device
from metarobot.learning.ppo_core import run_epochs
from metarobot.tasks.family import families
from metarobot.training import task_sampling as worlds
from metarobot.training import train as module
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import Run, build_learner, open_run
from metarobot.training.train import reopen_run, start_run, train

pytest.importorskip("mujoco_warp")

from metarobot.bench.device_memory import bench_memory
from metarobot.bench.device_speed import bench_device

SMALL = {"worlds": 4, "minibatches": 2, "epochs": 1, "width": 8}


def short(made: Run) -> Run:
    """The same run with episodes of 3 steps: Warp is slow on a CPU."""
    return replace(made, family=replace(made.family, horizon=3))


def digest(out: Path) -> Any:
    return json.loads((out / "checkpoint.json").read_text())["sha256"]


def config(steps: int = 48, sim: str = "warp", **more: Any) -> TrainConfig:
    usual = {"family": "CheetahTerrain", "threads": 1, "save_every": 1, "pool": 5}
    return TrainConfig(**usual | more, steps=steps, sim=sim)


def test_a_run_on_warp_is_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = agents.get("rl2").config(**SMALL)
    said: list[str] = []
    whole = short(start_run(config(), small, tmp_path / "whole", said.append))
    assert said == ["physics: warp on cpu, as asked"]
    assert train(whole, show=False)
    broken = short(start_run(config(), small, tmp_path / "broken"))
    with monkeypatch.context() as m:
        real, calls = module.save_checkpoint, iter([None])
        m.setattr(module, "save_checkpoint", lambda *a: (next(calls), real(*a)))
        with pytest.raises(StopIteration):
            train(broken, show=False)
    assert train(short(open_run(broken.folder)), show=False)
    assert digest(broken.folder) == digest(whole.folder)
    assert [row["sim/lost_contacts"] for row in read_metrics(whole.folder / "metrics.jsonl")] == [
        0.0,
        0.0,
    ]
    assert whole.config["sim"] == "warp"


def test_a_run_moves_between_simulators_and_that_is_said(tmp_path: Path) -> None:
    small, out = agents.get("rl2").config(**SMALL), tmp_path / "run"
    said: list[str] = []
    assert train(short(start_run(config(24, "cpu"), small, out)), show=False)
    for steps, sim in ((48, "warp"), (72, ""), (96, "cpu")):
        made = reopen_run(config(steps, sim), small, out, said.append)
        assert train(short(made), show=False)
        assert made.config["sim"] == (sim or "warp")
    goes = (
        "goes on with {} physics and learning on cpu, "
        "after {} physics and learning on cpu: other roundings"
    )
    assert [line for line in said if line.startswith("goes")] == [
        goes.format("warp", "cpu"),
        goes.format("cpu", "warp"),
    ]
    rows = read_metrics(out / "metrics.jsonl")
    assert [r["time/iterations"] for r in rows] == [1, 2, 3, 4]
    assert ["sim/lost_contacts" in r for r in rows] == [False, True, True, False]


def test_tasks_with_models_of_their_own_are_dealt_from_a_pool_keyed_by_the_seed() -> None:
    family = families.get("CheetahTerrain")
    one, other = (
        worlds.make_task_source(family, 4, 2, seed=s, sim="warp", device="cpu", pool=5, threads=1)
        for s in (0, 1)
    )
    dealt = [one.sample_tasks(i) for i in range(8)]
    assert len({t for tasks in dealt for t in tasks}) == 5
    assert one.sample_tasks(3) == dealt[3]
    assert not set(other.sample_tasks(0)) & {t for tasks in dealt for t in tasks}
    known = len(one.env.sim._library._models)
    for tasks in dealt[:2]:
        one.env.set_tasks([t for t in tasks for _ in range(2)])
    assert len(one.env.sim._library._models) == known
    assert torch.equal(one.env._values, family.space.values(one.env.tasks).float())


def test_more_tasks_than_the_pool_holds_are_dealt_evenly() -> None:
    family = families.get("CheetahTerrain")
    where = worlds.make_task_source(
        family, 7, 1, seed=0, sim="warp", device="cpu", pool=3, threads=1
    )
    _, counts = np.unique([str(t.values) for t in where.sample_tasks(0)], return_counts=True)
    assert sorted(counts) == [2, 2, 3]


def test_tasks_that_share_a_model_are_drawn_as_on_the_cpu() -> None:
    family = families.get("CheetahVel")
    sims = [
        worlds.make_task_source(family, 3, 1, seed=2, sim=s, device="cpu", pool=0, threads=1)
        for s in SIMS
    ]
    assert sims[0].sample_tasks(5) == sims[1].sample_tasks(5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--sim", "bullet"], "no simulator called 'bullet'; there are: cpu, warp"),
        (
            ["--sim", "warp", "--agent", "sb3:ppo"],
            "does not collect trials on Warp; leave --sim out",
        ),
        (["--sim", "warp", "--worlds", "10000000"], r"need .* GB free: about [\d,]+ would fit"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    code, _, err = run(capsys, "train", "CheetahVel", "--out", str(tmp_path / "x"), *more)
    assert code == 2
    assert re.search(says, err.splitlines()[-1])
    assert not (tmp_path / "x").exists()


def test_a_family_that_warp_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetarobotError, match="geom_type"):
        start_run(config(family="GraspShapes"), agents.get("rl2").config(**SMALL), tmp_path / "x")


def test_without_warp_or_a_gpu_the_cpu_is_chosen_and_why_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    sim, why = choose_simulator(families.get("CheetahVel"), "", "cuda")
    assert sim == "cpu"
    assert why.startswith("physics: cpu, as Warp cannot: Warp finds no CUDA device")


def test_memory_that_runs_out_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start_run(
        TrainConfig(family="CheetahDir100", steps=800),
        agents.get("rl2").config(**SMALL),
        tmp_path / "x",
    )

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(module, "collect", full)
    with pytest.raises(
        MetarobotError, match=r"out of memory .CUDA out of memory.; take fewer --worlds"
    ):
        train(made, show=False)


@pytest.mark.parametrize("name", ["rl2", "varibad", "pearl", "prototype", "maml", "imitation"])
def test_all_that_a_learner_holds_moves_with_it(name: str) -> None:
    learner = build_learner(name, agents.get(name).config(), families.get("CheetahDir100"), 0)
    move_to_device(learner, "meta")
    held = {k: v for k, v in learner.state().items() if not k.startswith(("replay.", "optimiser."))}
    assert held
    assert {v.device.type for v in held.values()} == {"meta"}


def test_the_bound_stops_the_step_that_broke_it_on_the_cpu() -> None:
    said = iter([0.1, 0.2, 0.9, 0.1])
    sums, taken = run_epochs([[lambda: torch.tensor([1.0, next(said)])] * 2] * 2, 1, 0.5)
    assert taken == 3
    torch.testing.assert_close(sums, torch.tensor([3.0, 1.2]))


def test_a_devices_rates_and_memory_are_measured() -> None:
    family = replace(families.get("CheetahTerrain"), horizon=2)
    report = bench_device(family, worlds=3, seconds=0.01, device="cpu")
    assert report["models"] == 3
    assert report["lost"] == {}
    assert report["physics_steps_per_s"] == pytest.approx(
        report["engine_steps_per_s"] * family.substeps
    )
    assert report["ratio"] == pytest.approx(report["steps_per_s"] / report["engine_steps_per_s"])
    held = bench_memory(family, worlds=16, device="cpu")
    assert [row["worlds"] for row in held["rows"]] == [16]
    assert held["rows"][0]["physics_gb"] > 0
    assert held["end"] == ""


def test_memory_is_measured_to_the_end_of_it_and_the_end_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metarobot.env.device.free_memory", lambda _: 10_000)
    report = bench_memory(families.get("CheetahVel"), worlds=16, device="cpu")
    assert report["rows"] == []
    assert report["end"].startswith("16 worlds: 16 worlds of CheetahVel need")


def test_on_warp_only_some_benchmarks_exist(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "bench", "maml", "--sim", "warp")
    assert code == 2
    assert "on Warp there are: sim, memory" in err
