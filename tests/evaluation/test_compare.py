"""A comparison finds, trains, resumes and plays what a plan asks for, once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run as command
from helpers import tiny_run

import metarobot.evaluation.compare as module
import metarobot.evaluation.fine_tuning as fine_tuning
import metarobot.evaluation.statistics as stats
from metarobot.errors import MetarobotError
from metarobot.evaluation.compare import (
    Job,
    Plan,
    PlanETA,
    compare_runs,
    count_plays,
    difference,
    parse_settings,
    plan_jobs,
    train_plan,
)
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import Evaluator, Protocol
from metarobot.learning.agent_interface import agents, comparable_agents
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import Run, open_run
from metarobot.training.run_lock import RunLock
from metarobot.training.train import reopen_run

SMALL = {
    "rl2": {"worlds": 4, "minibatches": 2, "epochs": 2, "width": 8},
    "blind": {"worlds": 4, "minibatches": 2, "epochs": 2, "width": 8},
    "oracle": {"worlds": 4, "minibatches": 2, "epochs": 2, "width": 8},
    "maml": {"worlds": 4, "rollouts": 2, "width": 8},
}
PROTOCOL = Protocol(tasks=2, episodes=2, threads=1)


def plan(out: Path, *names: str, **more: Any) -> Plan:
    chosen = names or tuple(SMALL)
    settings = {k: SMALL[k] for k in chosen}
    small_plan = {
        "family": "CheetahDir100",
        "out": out,
        "agents": chosen,
        "steps": 1600,
        "threads": 1,
        "settings": settings,
    }
    return Plan(**small_plan | more)


def gathered(asked: Plan) -> tuple[dict[str, list[Run]], list[str]]:
    said: list[str] = []
    return train_plan(asked, PROTOCOL, said.append, lambda *_: None), said


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """Fewer bootstrap samples and step sizes: what is compared is made with the same few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 50)
        patch.setattr(fine_tuning, "STEP_SIZES", (0.1, 1.0))
        yield


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, coarse: None
) -> tuple[Plan, dict[str, list[Run]], dict[str, Any]]:
    asked, ticks = plan(tmp_path_factory.mktemp("plan") / "runs"), []
    runs, _ = gathered(asked)
    report = compare_runs(asked, runs, PROTOCOL, lambda: ticks.append(None))
    assert len(ticks) == count_plays(runs, PROTOCOL)
    return asked, runs, report


def test_every_agent_is_trained_for_the_same_steps_and_played_on_the_same_tasks(done: Any) -> None:
    asked, runs, report = done
    assert set(report["agents"]) == {*SMALL, "fine-tuning", "fine-tuning from scratch"}
    for name in SMALL:
        entry = report["agents"][name]
        assert entry["steps"] == [1600]
        assert entry["wall_s"][0] > 0
        alone = evaluate(runs[name], PROTOCOL)
        assert entry["returns"] == alone["returns"]
        assert [r["ci95"] for r in entry["episodes"]] == [r["ci95"] for r in alone["episodes"]]
    assert sorted(p.name for p in asked.out.iterdir()) == sorted(
        [*(f"CheetahDir100-{n}-0" for n in SMALL), "played"]
    )


def test_fine_tuning_is_what_an_evaluation_makes_of_it(done: Any) -> None:
    _, runs, report = done
    evaluator = Evaluator(runs["maml"][0].family, PROTOCOL)
    alone = fine_tuning.fine_tune(runs["maml"], runs["blind"], evaluator)
    for name, tuned in (
        ("fine-tuning", "pretrained"),
        ("fine-tuning from scratch", "from scratch"),
    ):
        assert report["agents"][name]["returns"] == alone[tuned]["returns"]
        assert report["agents"][name]["explores"]


def test_ranks_are_by_the_last_episode_and_leave_oracles_out(done: Any) -> None:
    entries = done[2]["agents"]
    assert "rank" not in entries["oracle"]
    ranked = sorted((e for e in entries.values() if "rank" in e), key=lambda e: e["rank"])
    means = [e["episodes"][-1]["mean"] for e in ranked]
    assert means == sorted(means, reverse=True)
    assert [e["rank"] for e in ranked] == list(range(1, len(entries)))
    assert entries["oracle"]["episodes"][0]["score"] == pytest.approx(1)
    assert entries["blind"]["episodes"][0]["score"] == pytest.approx(0)


def test_asked_again_nothing_is_trained_or_played(
    done: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, runs, report = done

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was done already")

    monkeypatch.setattr(module, "start_training", never)
    monkeypatch.setattr(module, "open_training", never)
    monkeypatch.setattr(module.Evaluator, "play", never)
    again, said = gathered(asked)
    assert {k: [r.folder for r in v] for k, v in again.items()} == {
        k: [r.folder for r in v] for k, v in runs.items()
    }
    assert all(": found " in line for line in said)
    assert compare_runs(asked, again, PROTOCOL) == report


def test_another_protocol_or_checkpoint_is_played_anew(done: Any, tmp_path: Path) -> None:
    asked, runs, report = done
    other = compare_runs(
        asked, {"rl2": runs["rl2"]}, Protocol(tasks=2, episodes=2, seed=1, threads=1)
    )
    assert other["agents"]["rl2"]["returns"] != report["agents"]["rl2"]["returns"]
    trained = tiny_run(tmp_path / "x", seed=5)
    more = compare_runs(asked, {"rl2": [*runs["rl2"], trained]}, PROTOCOL)["agents"]["rl2"]
    assert more["seeds"] == [0, 5]
    assert more["returns"][0] == report["agents"]["rl2"]["returns"][0] != more["returns"][1]


def test_runs_elsewhere_are_reused_where_they_match_and_it_is_said(
    done: Any, tmp_path: Path
) -> None:
    asked, runs, _ = done
    again, said = gathered(plan(tmp_path / "new", "rl2", "blind", reuse=(asked.out,)))
    assert [again[k][0].folder for k in ("rl2", "blind")] == [
        runs[k][0].folder for k in ("rl2", "blind")
    ]
    assert said == [f"{k}, seed 0: reused {runs[k][0].folder}" for k in ("rl2", "blind")]
    assert not (tmp_path / "new").exists()
    by_itself, _ = gathered(plan(tmp_path / "new", "rl2", reuse=(runs["rl2"][0].folder,)))
    assert by_itself["rl2"][0].folder == runs["rl2"][0].folder


def test_another_setting_or_unfinished_is_trained_anew_and_the_setting_named(
    done: Any, tmp_path: Path
) -> None:
    asked, runs, _ = done
    settings = {"rl2": SMALL["rl2"] | {"epochs": 1}}
    again, said = gathered(plan(tmp_path / "new", "rl2", reuse=(asked.out,), settings=settings))
    folder = runs["rl2"][0].folder
    assert said == [f"rl2, seed 0: {folder} is another experiment: epochs 2, not 1",
                    f"rl2, seed 0: training in {tmp_path}/new/CheetahDir100-rl2-0"]  # fmt: skip
    assert again["rl2"][0].config["agent_config"]["epochs"] == 1
    shutil.copytree(folder, tmp_path / "half")
    for path in (tmp_path / "half").glob("checkpoint*.json"):
        state = json.loads(path.read_text())
        del state["content_sha256"]
        path.write_text(json.dumps(state | {"steps": 800}))
    said = gathered(plan(tmp_path / "newer", "rl2", reuse=(tmp_path / "half",)))[1]
    assert said[0] == f"rl2, seed 0: {tmp_path}/half is not finished"
    assert "training in" in said[1]


def test_a_run_of_other_settings_in_the_plans_own_place_is_put_aside_not_lost(
    tmp_path: Path,
) -> None:
    asked = plan(tmp_path, "blind")
    first, _ = gathered(asked)
    before = json.loads((first["blind"][0].folder / "checkpoint.json").read_text())["sha256"]
    settings = {"blind": SMALL["blind"] | {"lr": 0.01}}
    with (
        RunLock(first["blind"][0].folder),
        pytest.raises(MetarobotError, match="CheetahDir100-blind-0 is being written by process"),
    ):
        gathered(plan(tmp_path, "blind", settings=settings))
    second, said = gathered(plan(tmp_path, "blind", settings=settings))
    aside = tmp_path / "CheetahDir100-blind-0.old1"
    assert any("lr 0.001, not 0.01" in line for line in said)
    assert any(str(aside) in line for line in said)
    assert json.loads((aside / "checkpoint.json").read_text())["sha256"] == before
    assert second["blind"][0].config["agent_config"]["lr"] == 0.01


def test_a_setting_that_came_later_is_the_usual_one_in_an_older_run() -> None:
    job = plan_jobs(plan(Path("x"), "rl2"))[0]
    older = {
        **vars(job.train),
        "agent_config": {k: v for k, v in vars(job.agent).items() if k != "teach"},
    }
    assert difference(older, job) == ""
    assert difference({**older, "threads": 7}, job) == ""
    assert difference({**older, "steps": 5}, job) == "steps 5, not 1600"


def cli(out: Path, *more: str) -> list[str]:
    smaller = {"worlds": 2, "minibatches": 1, "epochs": 1, "width": 8}
    words = [f"{agent}.{k}={v}" for agent in ("rl2", "blind") for k, v in smaller.items()]
    where = [
        "CheetahDir100",
        "--out",
        str(out),
        "--agents",
        "rl2",
        "blind",
        "--steps",
        "20e3",
        "--tasks",
        "2",
    ]
    return [
        sys.executable,
        "-m",
        "metarobot.cli.main",
        "compare",
        *where,
        "--threads",
        "1",
        "--set",
        *words,
        *more,
    ]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def test_killed_or_interrupted_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(cli(whole), check=True, capture_output=True)
    process = subprocess.Popen(cli(broken), stderr=subprocess.PIPE, text=True)
    wait_for(broken / "CheetahDir100-rl2-0" / "checkpoint.json", process)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped and saved; the same command goes on from here" in errors
    process = subprocess.Popen(cli(broken), stderr=subprocess.PIPE, text=True)
    wait_for(broken / "CheetahDir100-blind-0" / "checkpoint.json", process)
    process.kill()
    process.communicate()
    last = subprocess.run(cli(broken), check=True, capture_output=True, text=True)
    assert "rl2, seed 0: found" in last.stderr
    assert "blind, seed 0: resumed after" in last.stderr
    reports = [
        json.loads((x / "CheetahDir100-compare-test.json").read_text()) for x in (whole, broken)
    ]
    for name in ("rl2", "blind"):
        a, b = (r["agents"][name] for r in reports)
        assert a["returns"] == b["returns"]
        assert a["episodes"] == b["episodes"]


def test_command_line_writes_a_table_in_three_forms_and_a_plot(
    done: Any, capsys: Any, tmp_path: Path
) -> None:
    asked, _, report = done
    words = [f"{a}.{k}={v}" for a in SMALL for k, v in SMALL[a].items()]
    where = [
        "CheetahDir100",
        "--out",
        str(asked.out),
        "--results",
        str(tmp_path / "r"),
        "--agents",
        *SMALL,
    ]
    more = ["--steps", "1600", "--tasks", "2", "--threads", "1", "--set", *words]
    code, out, err = command(capsys, "compare", *where, *more)
    assert code == 0
    assert "fine-tuning from scratch" in out
    assert err.count(": found ") == len(SMALL)
    stem = tmp_path / "r" / "CheetahDir100-compare-test"
    assert json.loads(stem.with_suffix(".json").read_text()) == report
    lines = stem.with_suffix(".md").read_text().splitlines()
    header = [x.strip() for x in lines[2].strip("|").split("|")]
    assert header[:2] == ["rank", "agent"]
    assert {"after 0 episodes", "after 1 episode", "score", "steps", "wall time"} <= set(header)
    assert len(lines) == 4 + len(report["agents"])
    assert lines[-1].startswith("| – | oracle")
    assert stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_all_agents_are_compared_by_default_each_once_and_none_that_imitates() -> None:
    names = comparable_agents()
    assert {"rl2", "maml", "promp", "blind", "oracle"} <= set(names)
    assert not {"ppo", "imitation"} & set(names)
    assert [j.train.agent for j in plan_jobs(Plan(family="CheetahVel", out=Path("x")))] == list(
        names
    )


def test_settings_are_read_as_their_own_types() -> None:
    read = parse_settings(
        ["rl2.epochs=8", "rl2.lr=1e-4", "rl2.memory=gru", "maml.learn_rates=False", "rl2.steps=3e6"]
    )
    assert read == {
        "rl2": {"epochs": 8, "lr": 1e-4, "memory": "gru", "steps": 3_000_000},
        "maml": {"learn_rates": False},
    }
    job = plan_jobs(
        Plan(family="CheetahVel", out=Path("x"), agents=("rl2",), settings={"rl2": read["rl2"]})
    )[0]
    assert (job.train.steps, job.agent.epochs) == (3_000_000, 8)


def test_eta_knows_each_agents_pace() -> None:
    made = [
        Job(TrainConfig(family="CheetahVel", agent=a, steps=100), None)
        for a in ("rl2", "blind", "oracle")
    ]
    eta = PlanETA(made)
    assert eta.steps == 300
    eta.update(made[0], {"time/total_timesteps": 40, "time/time_elapsed": 80.0})
    assert (eta.steps, eta.seconds) == (260, 260 * 2.0)
    eta.update(made[1], {"time/total_timesteps": 100, "time/time_elapsed": 100.0})
    # 60 steps of rl2 at 2 s, 100 of oracle at the mean of 1.5 s
    assert (eta.steps, eta.seconds) == (160, 60 * 2.0 + 100 * 1.5)


def test_progress_is_reported_after_every_iteration(tmp_path: Path) -> None:
    reported: list[tuple[str, int]] = []

    def watch(job: Job, metrics: Mapping[str, float], eta: PlanETA) -> None:
        reported.append((job.name, eta.steps))

    runs = train_plan(plan(tmp_path, "rl2", "blind"), PROTOCOL, lambda _: None, watch)
    assert [n for n, _ in reported] == ["CheetahDir100-rl2-0"] * 2 + ["CheetahDir100-blind-0"] * 2
    assert [s for _, s in reported] == [2400, 1600, 800, 0]
    assert len(read_metrics(runs["rl2"][0].folder / "metrics.jsonl")) == 2


def test_a_run_that_compare_trained_is_any_other_run(done: Any) -> None:
    _, runs, _ = done
    run = runs["rl2"][0]
    same = TrainConfig(family="CheetahDir100", agent="rl2", steps=1600, threads=1)
    assert (
        reopen_run(same, agents.get("rl2").config(**SMALL["rl2"]), run.folder).folder
        == open_run(run.folder).folder
    )


BAD = {
    "unknown family": (
        "compare CheetahFly --out {tmp}/x",
        "no family called 'CheetahFly'; there are: ",
    ),
    "unknown agent": (
        "compare CheetahVel --agents rl2 dqn --out {tmp}/x",
        "no agent called 'dqn'; there are: ",
    ),
    "unknown split": ("compare CheetahVel --agents rl2 --split far --out {tmp}/x", "far"),
    "imitation": (
        "compare CheetahVel --agents imitation --out {tmp}/x",
        "'imitation' needs --demos",
    ),
    "no steps": (
        "compare CheetahVel --agents rl2 --steps 0 --out {tmp}/x",
        "steps must be at least 1, not 0",
    ),
    "no tasks": (
        "compare CheetahVel --agents rl2 --tasks 0 --out {tmp}/x",
        "tasks must be at least 1, not 0",
    ),
    "no number": (
        "compare CheetahVel --agents rl2 --out {tmp}/x --set rl2.epochs=many",
        "'many' is no number",
    ),
    "no whole number": (
        "compare CheetahVel --agents rl2 --out {tmp}/x --set rl2.epochs=1.5",
        "1.5 is no whole number",
    ),
    "no setting": (
        "compare CheetahVel --agents rl2 --out {tmp}/x --set rl2.colour=1",
        "has no setting 'colour'; it has: ",
    ),
    "no form": (
        "compare CheetahVel --agents rl2 --out {tmp}/x --set epochs=1",
        "write AGENT.NAME=VALUE",
    ),
    "setting of nobody": (
        "compare CheetahVel --agents rl2 --out {tmp}/x --set maml.kl=1",
        "which is not compared",
    ),
    "bad setting": (
        "compare CheetahVel --agents rl2 --out {tmp}/x --set rl2.epochs=0",
        "epochs must be at least 1",
    ),
    "bad bench": ("bench agents CheetahVel --worlds 0", "worlds and seconds must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(
    case: str, capsys: Any, tmp_path: Path
) -> None:
    argv, message = BAD[case]
    code, _, err = command(capsys, *(w.format(tmp=tmp_path) for w in argv.split()))
    assert code == 2
    assert message in err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        err.splitlines()[-1]
    ]
    assert not list(tmp_path.iterdir())


def test_bench_measures_how_fast_agents_live_against_rl2(capsys: Any, tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    sizes = ["--worlds", "20", "--seconds", "0.1", "--threads", "1"]
    code, out, _ = command(
        capsys, "bench", "agents", "CheetahDir100", *sizes, "--json", str(target)
    )
    assert code == 0
    assert "against rl2" in out
    rates = json.loads(target.read_text())["agents"]
    assert set(rates) == set(comparable_agents())
    assert rates["rl2"]["ratio"] == 1
    assert all(np.isfinite(r["steps_per_s"]) and r["steps_per_s"] > 0 for r in rates.values())
