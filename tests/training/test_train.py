import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import first_reach, read_metrics
from metarobot.training.run_folder import open_run
from metarobot.training.train import reopen_run, start_run, train

SMALL = (
    "--worlds",
    "4",
    "--minibatches",
    "2",
    "--epochs",
    "2",
    "--threads",
    "1",
    "--save-every",
    "1",
)


def command(out: Path, steps: str, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "metarobot.cli.main",
        "train",
        "CheetahDir100",
        "--steps",
        steps,
        "--out",
        str(out),
        *SMALL,
        *more,
    ]


def digest(out: Path) -> str:
    return json.loads((out / "checkpoint.json").read_text())["sha256"]


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    a, b, c = (tiny_run(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert digest(a.folder) == digest(b.folder) != digest(c.folder)


SETTINGS = {
    f"rl2 {m}": {"worlds": 4, "minibatches": 2, "epochs": 2, "memory": m}
    for m in ("linear", "gru", "lstm")
}
SETTINGS["varibad"] = {"worlds": 4, "minibatches": 2, "epochs": 2, "width": 16}
SETTINGS |= {
    name: {"worlds": 4, "rollouts": 2, "width": 8} for name in ("maml", "promp", "reptile")
}
SETTINGS["prototype"] = {
    "worlds": 4,
    "minibatches": 2,
    "epochs": 2,
    "width": 8,
    "bank": 6,
    "lessons": 2,
}
SETTINGS["pearl"] = {
    "worlds": 2,
    "width": 8,
    "tasks": 2,
    "batch": 4,
    "gradient_steps": 2,
    "replay": 1500,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_from_any_checkpoint_gives_the_uninterrupted_bits(
    tmp_path: Path, name: str
) -> None:
    agent = name.split()[0]
    config = agents.get(agent).config(**SETTINGS[name])
    settings = TrainConfig(family="CheetahDir100", agent=agent, steps=3200, threads=1, save_every=1)
    whole = start_run(settings, config, tmp_path / "whole")
    train(whole, show=False)
    broken = start_run(settings, config, tmp_path / "broken")
    calls = 0

    def die_after_two(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("power cut")
        real(*args)

    import metarobot.training.train as module

    real = module.save_checkpoint
    module.save_checkpoint = die_after_two
    try:
        with pytest.raises(RuntimeError, match="power cut"):
            train(broken, show=False)
    finally:
        module.save_checkpoint = real
    assert json.loads((broken.folder / "checkpoint.json").read_text())["iteration"] == 2
    assert train(open_run(broken.folder), show=False)
    assert digest(broken.folder) == digest(whole.folder)
    rows = [read_metrics(r.folder / "metrics.jsonl") for r in (whole, broken)]
    clock = {"time/fps", "time/collect_fps", "time/learn_fps", "time/time_elapsed"}
    plain = [[{k: v for k, v in row.items() if k not in clock} for row in r] for r in rows]
    assert plain[0] == plain[1]


def test_kill_nine_and_resume_give_the_uninterrupted_bits(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path / "whole", "16000"), check=True, capture_output=True)
    victim = subprocess.Popen(command(tmp_path / "killed", "16000"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.kill()
    victim.wait()
    assert json.loads((tmp_path / "killed" / "checkpoint.json").read_text())["steps"] < 16000
    subprocess.run(
        command(tmp_path / "killed", "16000", "--resume"), check=True, capture_output=True
    )
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")


def test_a_run_is_resumed_for_the_steps_it_was_started_for_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    argv = command(tmp_path / "x", "16000")
    resumed = [a for a in argv if a not in ("--steps", "16000")] + ["--resume"]
    victim = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    while not (tmp_path / "x" / "checkpoint.json").exists():
        time.sleep(0.005)
    victim.kill()
    victim.wait()
    subprocess.run(resumed, check=True, capture_output=True)
    before = digest(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "checkpoint.json").read_text())["steps"] == 16000
    assert open_run(tmp_path / "x").config["steps"] == 16000
    subprocess.run(resumed, check=True, capture_output=True)
    assert digest(tmp_path / "x") == before


def test_a_run_that_is_through_can_be_made_longer_but_not_shorter(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    kind = run.agent_config
    longer = replace(run.train_config, steps=4000)
    with pytest.raises(MetarobotError, match="with steps 900: it was trained with 1600"):
        reopen_run(replace(longer, steps=900), kind, run.folder)
    again = reopen_run(replace(longer, steps=1600), kind, run.folder)
    before = digest(run.folder)
    assert train(again, show=False)
    assert digest(run.folder) == before
    assert train(reopen_run(longer, kind, run.folder), show=False)
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert rows[-1]["time/total_timesteps"] >= 4000
    assert open_run(run.folder).config["steps"] == 4000
    last = [r for r in rows if r["time/total_timesteps"] <= 1600][-1]
    assert rows[-1]["train/learning_rate"] != last["train/learning_rate"]


def test_learner_and_worlds_are_built_once_a_training(tmp_path: Path, monkeypatch) -> None:
    built: list[str] = []
    kind = agents.get("rl2")
    counted = replace(kind, build=lambda *a: (built.append("learner"), kind.build(*a))[1])
    monkeypatch.setitem(agents._items, "rl2", counted)
    real = Env.__init__

    def init(self: Env, *arguments: object, **settings: object) -> None:
        built.append("environment")
        real(self, *arguments, **settings)

    monkeypatch.setattr(Env, "__init__", init)
    tiny_run(tmp_path / "x", steps=400)
    assert sorted(built) == ["environment", "learner"]


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path / "x", "1e9"), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "x" / "checkpoint.json").exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: metarobot train CheetahDir100" in errors
    assert errors.strip().endswith("--resume")
    assert "Traceback" not in errors
    rows = read_metrics(tmp_path / "x" / "metrics.jsonl")
    assert json.loads((tmp_path / "x" / "checkpoint.json").read_text())["iteration"] == len(rows)


def test_metrics_reach_jsonl_and_tensorboard_under_the_known_names(runs) -> None:
    folder = runs["rl2"].folder
    row = read_metrics(folder / "metrics.jsonl")[-1]
    names = {
        "rollout/ep_rew_mean",
        "time/fps",
        "train/approx_kl",
        "train/value_loss",
        "train/belief_loss",
    }
    names |= {
        "meta/pre_adapt_return",
        "meta/post_adapt_return",
        "meta/adaptation_gain",
        "reward/speed",
        "sim/faults",
    }
    assert names <= set(row)
    assert row["meta/adaptation_gain"] == pytest.approx(
        row["meta/post_adapt_return"] - row["meta/pre_adapt_return"]
    )
    board = EventAccumulator(str(folder))
    board.Reload()
    assert names <= set(board.Tags()["scalars"])
    assert board.Scalars("time/fps")[-1].step == row["time/total_timesteps"]


def test_learning_rate_falls_along_the_steps(runs) -> None:
    rates = [r["train/learning_rate"] for r in read_metrics(runs["rl2"].folder / "metrics.jsonl")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(2e-3)


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    tiny_run(tmp_path / "x", steps=800)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"device": "tpu"}, "no device called 'tpu'; there are: cpu, cuda"),
        ({"family": "CheetahFly"}, "no family called 'CheetahFly'; there are: "),
        ({"agent": "dqn"}, "no agent called 'dqn'; there are: "),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    tmp_path: Path, change, message
) -> None:
    settings = TrainConfig(**{"family": "CheetahVel", **change})
    with pytest.raises(MetarobotError, match=message):
        start_run(settings, agents.get("rl2").config(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["worlds", "episodes", "epochs", "minibatches", "width"])
@pytest.mark.parametrize("agent", ["rl2", "oracle"])
def test_counts_below_one_are_refused(tmp_path: Path, name: str, agent: str) -> None:
    kind = agents.get(agent)
    with pytest.raises(MetarobotError, match=f"{name} must be at least 1, not 0"):
        start_run(
            TrainConfig(family="CheetahVel", agent=agent), kind.config(**{name: 0}), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_first_reach_is_a_running_mean() -> None:
    rows = [{"meta/post_adapt_return": float(i), "time/total_timesteps": i} for i in range(30)]
    assert first_reach(rows, 15.0)["time/total_timesteps"] == 20
    assert first_reach(rows, 99.0) is None
