"""Reports: a table, a picture and a file of the same JSON data."""

from pathlib import Path

import pytest

from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import Protocol
from metarobot.evaluation.report import ComparisonReport, EvaluationReport
from metarobot.files import read_json
from metarobot.training.run_files import CheckpointError


@pytest.fixture(scope="module")
def report(runs) -> EvaluationReport:
    protocol = Protocol(tasks=3, episodes=2, threads=1)
    data = evaluate([runs["rl2"]], protocol, blind=[runs["blind"]], controls=True)
    return EvaluationReport(data)


def test_its_items_are_those_of_the_data(report: EvaluationReport) -> None:
    assert report["agent"] == report.data["agent"] == "rl2"
    assert "episodes" in report
    assert "beliefs" not in report
    with pytest.raises(KeyError):
        report["beliefs"]


def test_the_table_holds_every_episode_baseline_and_control(report: EvaluationReport) -> None:
    table = report.table()
    assert "CheetahDir100, 3 test tasks, training seeds [0]" in table
    for row in report["episodes"]:
        assert f"{row['mean']:.1f}" in table
    for column in ("IQM", "worst 10 %", "blind", "1, cleared", "1, swapped"):
        assert column in table
    assert "\x1b" not in table  # no colours where nobody looks at a terminal


def test_a_saved_report_is_read_back_as_it_was(report: EvaluationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == report.data
    assert EvaluationReport(read_json(tmp_path / "report.json")).table() == report.table()


def test_a_plot_is_a_picture_and_nothing_else(report: EvaluationReport, tmp_path: Path) -> None:
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CheckpointError, match=r"must end in one of \.png, \.svg, \.pdf"):
        report.plot(tmp_path / "report.txt")


def test_a_comparison_has_a_row_for_every_agent(tmp_path: Path) -> None:
    row = {"mean": 1.0, "ci95": [0.5, 1.5], "worst10": 0.1, "iqm": 1.0}
    entry = {
        "episodes": [{"episode": 0, **row}, {"episode": 1, **row}],
        "rollouts": 1,
        "explores": False,
        "privileged": False,
        "steps": [1_000_000],
        "wall_s": [60.0],
        "seeds": [0],
    }
    agents = {
        "rl2": {**entry, "rank": 1},
        "maml": {**entry, "rank": 2, "rollouts": 20, "explores": True},
        "oracle": {**entry, "privileged": True},
    }
    data = {"family": "CheetahVel", "split": "test", "tasks": 40, "seeds": [0], "agents": agents}
    report = ComparisonReport(data)
    lines = [line for line in report.table().splitlines() if "1.0 (0.5…1.5)" in line]
    assert ["rl2" in lines[0], "maml (20 rollouts, with noise)" in lines[1]] == [True, True]
    assert "–" in lines[2]
    assert "oracle" in lines[2]
    report.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").exists()
