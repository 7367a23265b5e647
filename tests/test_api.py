"""The public functions of ``metarobot``."""

from pathlib import Path

import pytest

import metarobot as mr
from metarobot.errors import MetarobotError
from metarobot.evaluation.report import EvaluationReport
from metarobot.files import read_json
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import Run

SMALL = {"worlds": 4, "minibatches": 2, "epochs": 1, "threads": 1, "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("api") / "x"
    return mr.train("CheetahDir100", agent="rl2", steps=800, seed=3, out=out, **SMALL)


def test_lists_and_lookups() -> None:
    assert "CheetahVel" in mr.families()
    assert mr.family("CheetahVel").name == "CheetahVel"
    assert {"rl2", "maml"} <= set(mr.agents())
    with pytest.raises(MetarobotError, match="no family called 'CheetahFly'; there are: "):
        mr.family("CheetahFly")


def test_a_run_knows_what_it_was_trained_with(run: Run) -> None:
    assert isinstance(run.train_config, TrainConfig)
    assert (run.train_config.seed, run.train_config.steps) == (3, 800)
    assert run.agent_config.minibatches == 2


def test_a_run_is_made_where_one_would_look_for_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = mr.train("CheetahDir100", "blind", steps=800, **SMALL)
    assert made.folder == Path("runs/CheetahDir100-blind-0")
    with pytest.raises(MetarobotError, match="holds a run already: continue it with --resume"):
        mr.train("CheetahDir100", "blind", steps=800, **SMALL)
    longer = mr.train("CheetahDir100", "blind", steps=1600, resume=True, **SMALL)
    assert longer.steps == 1600
    again = mr.train("CheetahDir100", "blind", resume=True, **SMALL)
    assert again.train_config.steps == 1600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "'epoch' is no setting of agent 'rl2', which has: worlds, .*, epochs, "),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"agent": "dqn"}, "no agent called 'dqn'; there are: "),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(tmp_path: Path, settings, message: str) -> None:
    with pytest.raises(MetarobotError, match=message) as error:
        mr.train("CheetahDir100", out=tmp_path / "x", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


def test_evaluate_takes_runs_folders_and_lists_of_them(run: Run, tmp_path: Path) -> None:
    played: list[tuple[int, int]] = []
    protocol = {"tasks": 2, "threads": 1}
    report = mr.evaluate(run, progress=lambda *done: played.append(done), **protocol)
    assert isinstance(report, EvaluationReport)
    assert played == [(1, 1)]
    assert "CheetahDir100" in report.table()
    report.save(tmp_path / "report.json")
    assert read_json(tmp_path / "report.json")["episodes"] == report["episodes"]
    for runs in (str(run.folder), run.folder, [run], [run.folder]):
        assert mr.evaluate(runs, **protocol)["returns"] == report["returns"]
    with pytest.raises(MetarobotError, match="at least one run"):
        mr.evaluate([])


def test_compare_finds_what_was_trained(run: Run, tmp_path: Path) -> None:
    lines: list[str] = []
    report = mr.compare(
        "CheetahDir100",
        ["rl2"],
        steps=800,
        seeds=[3],
        out=tmp_path,
        reuse=[run.folder],
        settings={"rl2": {"worlds": 4, "minibatches": 2, "epochs": 1}},
        tasks=2,
        threads=1,
        say=lines.append,
    )
    assert any("reused" in line for line in lines)
    assert "rl2" in report.table()


def test_agents_in_the_box_load_by_name(run: Run) -> None:
    assert mr.load_agent("CheetahDir-blind").begin(1) == ()
    assert type(mr.load_agent(run)) is type(mr.load_agent(run.folder))


def test_make_env_draws_tasks_or_takes_them() -> None:
    assert mr.make_env("CheetahVel", threads=1).worlds == 1
    drawn = mr.make_env("CheetahVel", worlds=3, split="test", seed=5, threads=1)
    assert drawn.tasks == mr.family("CheetahVel").space.sample("test", 3, 5)
    tasks = [{"target_speed": 1.0}, {"target_speed": 2.0}]
    speeds = [t.as_dict()["target_speed"] for t in mr.make_env("CheetahVel", tasks, worlds=4).tasks]
    assert speeds == [1.0, 1.0, 2.0, 2.0]
    with pytest.raises(MetarobotError, match="worlds = 3 is not a multiple of 2 tasks"):
        mr.make_env("CheetahVel", tasks, worlds=3)


def test_render_films_a_run(run: Run, tmp_path: Path, gl: None) -> None:
    film = mr.render(run, tmp_path / "x.mp4", size=(64, 48), progress=False)
    assert film.stat().st_size > 1000
