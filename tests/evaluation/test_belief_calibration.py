from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import tiny_run
from torch import Tensor

from metarobot.evaluation import plots as plot
from metarobot.evaluation import tables
from metarobot.evaluation.belief_calibration import LEVELS, BeliefRecorder
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.protocol import Protocol
from metarobot.files import read_json, write_json
from metarobot.learning.agent_interface import Context
from metarobot.tasks.family import families

SPACE = families.get("CheetahTerrain").space
TASKS = SPACE.sample("train", 120, 0)


class Believer:
    """Believes the truth but for an error of 0.2 and less with every episode, and says how large it
    thinks it is."""

    def __init__(self, seed: int = 0, claims: float = 1.0) -> None:
        self.truth, self.claims, self.rng = (
            SPACE.encode(TASKS),
            claims,
            torch.Generator().manual_seed(seed),
        )

    def begin(self, tasks: int) -> Context:
        return (torch.zeros(tasks, 1),)

    def posterior(self, context: Context) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(TASKS), 2), self._spread(context).square().expand(-1, 2)

    def belief(self, context: Context) -> tuple[Tensor, Tensor]:
        spread, noise = self._spread(context), torch.randn(self.truth.shape, generator=self.rng)
        return self.truth + spread * noise, (self.claims * spread).square().expand_as(self.truth)

    def _spread(self, context: Context) -> Tensor:
        return 0.2 / (1 + context[0])


def written(*agents: Believer, episodes: int = 3) -> dict:
    book = BeliefRecorder(SPACE, TASKS)
    for agent in agents:
        note, context = book.watch(agent), agent.begin(len(TASKS))
        for _ in range(episodes - 1):
            context = (context[0] + 1,)
            assert note(context) is context
    return book.report()


def test_errors_and_deviations_are_those_of_the_belief_after_each_episode() -> None:
    report = written(Believer(), Believer(seed=1))
    assert report["parameters"] == [p.name for p in SPACE.params]
    assert [r["episode"] for r in report["episodes"]] == [0, 1, 2]
    for k, row in enumerate(report["episodes"]):
        assert row["deviation"] == pytest.approx(0.2 / (1 + k))
        assert row["rmse"] == pytest.approx([0.2 / (1 + k)] * SPACE.width, rel=0.15)
        for value, (low, high) in zip(row["rmse"], row["rmse_ci95"], strict=True):
            assert low < value < high


def test_a_calibrated_belief_holds_the_truth_as_often_as_it_says_and_a_proud_one_less() -> None:
    calibrated, proud = (written(Believer(claims=c))["episodes"][-1] for c in (1.0, 0.5))
    for level in LEVELS:
        key = f"{level:g}"
        assert calibrated["coverage_all"][key] == pytest.approx(level, abs=0.05)
        low, high = calibrated["coverage_all_ci95"][key]
        assert low < calibrated["coverage_all"][key] < high
        # half the deviation claimed is half the quantile reached
        reached = 2 * NormalDist().cdf(0.5 * NormalDist().inv_cdf(0.5 + level / 2)) - 1
        assert proud["coverage_all"][key] == pytest.approx(reached, abs=0.05)
        assert np.mean(proud["coverage"][key]) == pytest.approx(proud["coverage_all"][key])


def test_agents_without_a_belief_leave_the_book_empty() -> None:
    book = BeliefRecorder(SPACE, TASKS)
    context = (torch.zeros(2, 1),)
    assert book.watch(object())(context) is context
    assert book.report() == {}


def test_parameters_that_the_encoding_leaves_out_are_left_out() -> None:
    space = replace(SPACE, params=(replace(SPACE.params[0], nuisance=True), *SPACE.params[1:]))
    book, agent = BeliefRecorder(space, TASKS), Believer()
    agent.truth = space.encode(TASKS)
    book.watch(agent)
    report = book.report()
    assert report["parameters"] == [p.name for p in SPACE.params[1:]]
    assert len(report["episodes"][0]["rmse"]) == space.width == SPACE.width - 1


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    torch.set_num_threads(1)
    run = tiny_run(
        tmp_path_factory.mktemp("beliefs") / "varibad",
        agent="varibad",
        family="CheetahVel100",
        steps=800,
    )
    return evaluate([run], Protocol(tasks=4, episodes=3, threads=1), controls=True)


def test_an_evaluation_reports_beliefs_and_survives_json(report, tmp_path: Path) -> None:
    beliefs = report["beliefs"]
    assert beliefs["parameters"] == [p.name for p in families.get("CheetahVel100").space.params]
    first, *later = beliefs["episodes"]
    assert first["deviation"] == 1.0
    assert [r["episode"] for r in later] == [1, 2]
    assert all(0 < r["deviation"] != 1.0 for r in later)
    write_json(tmp_path / "x.json", report)
    assert read_json(tmp_path / "x.json") == report


def test_beliefs_reach_table_and_picture(report, tmp_path: Path) -> None:
    said = tables.evaluation_table(report)
    assert "speed" in said
    assert "95 % interval holds" in said
    assert "deviation of the posterior over latent tasks: 1.000 → " in said
    plot.plot_evaluation(report, tmp_path / "with.png")
    plot.plot_evaluation(
        {k: v for k, v in report.items() if k != "beliefs"}, tmp_path / "without.png"
    )
    assert (tmp_path / "with.png").stat().st_size > (tmp_path / "without.png").stat().st_size


def test_other_agents_have_no_beliefs(runs) -> None:
    assert "beliefs" not in evaluate([runs["rl2"]], Protocol(tasks=2, episodes=1, threads=1))
