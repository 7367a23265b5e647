import numpy as np
import pytest
import torch
from helpers import tiny_run

from metarobot.errors import MetarobotError
from metarobot.evaluation.context_ablations import swap_contexts
from metarobot.evaluation.evaluate import evaluate
from metarobot.evaluation.fine_tuning import STEP_SIZES
from metarobot.evaluation.protocol import Evaluator, Protocol
from metarobot.evaluation.statistics import (
    adaptation_score,
    bootstrap_interval,
    iqm,
    summarise,
    worst_tenth,
)
from metarobot.files import read_json, write_json

SMALL = Protocol(tasks=4, episodes=3, threads=1)


def test_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    assert iqm(np.array([[0.0, 1.0, 2.0, 100.0]])) == 1.5
    values = np.random.default_rng(0).normal(size=(3, 40))
    low, high = np.quantile(values, [0.25, 0.75])
    assert iqm(values) == pytest.approx(values[(values >= low) & (values <= high)].mean())


def test_worst_tenth_averages_seeds_first() -> None:
    x = np.array([np.arange(20.0), np.arange(20.0) + 2])
    assert worst_tenth(x) == pytest.approx((0.5 + 0.5 + 2) / 2)
    assert worst_tenth(np.array([[5.0, 1.0]])) == 1.0


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        low, high = bootstrap_interval(rng.normal(size=(1, 40)), np.mean)
        hits += low <= 0 <= high
    assert 85 <= hits <= 100


def test_bootstrap_keeps_seeds_as_strata() -> None:
    x = np.array([[0.0] * 10, [10.0] * 10])
    assert bootstrap_interval(x, np.mean) == [5.0, 5.0]


def test_score_is_zero_for_blind_one_for_oracle() -> None:
    rng = np.random.default_rng(0)
    blind, oracle = rng.normal(0, 1, (2, 30)), rng.normal(10, 1, (2, 30))
    assert adaptation_score(blind, oracle, blind)["score"] == pytest.approx(0)
    assert adaptation_score(oracle, oracle, blind)["score"] == pytest.approx(1)
    half = adaptation_score((oracle + blind) / 2, oracle, blind)
    assert half["score"] == pytest.approx(0.5)
    assert half["score_ci95"][0] <= 0.5 <= half["score_ci95"][1]


def test_summary_holds_what_the_protocol_asks() -> None:
    row = summarise(np.random.default_rng(0).normal(size=(2, 20)))
    assert set(row) == {"mean", "iqm", "ci95", "iqm_ci95", "worst10"}
    assert row["ci95"][0] < row["mean"] < row["ci95"][1]


def test_report_holds_the_agreed_keys_and_survives_json(runs, tmp_path) -> None:
    report = evaluate(
        [runs["rl2"], runs["rl2_seed1"]],
        SMALL,
        oracle=[runs["oracle"]],
        blind=[runs["blind"]],
        controls=True,
    )
    assert (report["family"], report["split"], report["seeds"], report["tasks"]) == (
        "CheetahDir100",
        "test",
        [0, 1],
        4,
    )
    assert [r["episode"] for r in report["episodes"]] == [0, 1, 2]
    keys = {"episode", "mean", "iqm", "ci95", "worst10", "oracle", "blind", "score"}
    assert all(keys <= set(row) for row in report["episodes"])
    assert np.array(report["returns"]).shape == (2, 3, 4)
    assert set(report["controls"]) == {"cleared", "swapped"}
    write_json(tmp_path / "x.json", report)
    assert read_json(tmp_path / "x.json") == report


def test_the_same_evaluation_twice_is_the_same(runs) -> None:
    assert evaluate([runs["rl2"]], SMALL) == evaluate([runs["rl2"]], SMALL)


def test_an_agent_that_is_not_shown_the_task_is_no_oracle(runs) -> None:
    with pytest.raises(MetarobotError, match="is not an oracle"):
        evaluate([runs["rl2"]], SMALL, oracle=[runs["blind"]])


def test_runs_of_different_families_are_not_mixed(runs, tmp_path) -> None:
    other = tiny_run(tmp_path / "vel", family="CheetahVel100", steps=400)
    with pytest.raises(
        MetarobotError, match="different families cannot be compared: CheetahDir100, CheetahVel100"
    ):
        evaluate([runs["rl2"], other], SMALL)


def test_only_the_task_of_the_episode_reaches_a_blind_agent(runs) -> None:
    """Two worlds in different tasks but the same start and no reward input act alike."""
    agent, family = runs["blind"].load_agent(), runs["blind"].family
    forward, backward = family.space.finite
    evaluator = Evaluator(family, Protocol(tasks=2, episodes=1, seed=3, threads=1))
    returns = []
    for task in (forward, backward):
        evaluator.tasks = [task, task]
        returns.append(evaluator.play(agent).returns)
    there, back = returns
    effort = (there + back) / 2
    assert np.allclose(there - effort, effort - back, atol=1e-3)


def test_swapped_context_comes_from_another_task(runs) -> None:
    forward, backward = runs["rl2"].family.space.finite
    tasks = [forward, forward, backward, forward]
    (swapped,) = swap_contexts(tasks, (torch.arange(4.0)[:, None],))
    given = [tasks[int(i)] for i in swapped[:, 0]]
    assert all(a != b for a, b in zip(given, tasks, strict=True))


def test_clearing_changes_later_episodes_alone(runs) -> None:
    report = evaluate([runs["rl2"]], SMALL, controls=True)
    cleared = report["controls"]["cleared"]
    assert cleared[0]["mean"] == report["episodes"][0]["mean"]
    assert cleared[1]["mean"] != report["episodes"][1]["mean"]


def test_gain_is_over_the_first_episode_and_kinds_of_task_are_told_apart(runs) -> None:
    report = evaluate([runs["maml"]], SMALL)
    returns = np.array(report["returns"])
    assert "gain" not in report["episodes"][0]
    last = report["episodes"][2]
    assert last["gain"] == pytest.approx((returns[0, 2] - returns[0, 0]).mean(), abs=1e-2)
    assert last["gain_ci95"][0] <= last["gain"] <= last["gain_ci95"][1]
    forward = [t["direction"] == 1 for t in report["task_values"]]
    assert report["kinds"]["direction 1"] == pytest.approx(returns[0][:, forward].mean(1), abs=1e-2)
    assert set(report["kinds"]) == {"direction 1", "direction -1"}


def test_an_agent_that_adapts_between_episodes_meets_all_its_rollouts(runs) -> None:
    report = evaluate([runs["maml"]], SMALL, controls=True)
    assert report["rollouts"] == 2
    means = [r["mean"] for r in report["episodes"]]
    assert len(set(means)) == 3
    assert [r["mean"] for r in report["controls"]["cleared"]] != means
    assert [r["mean"] for r in report["controls"]["swapped"]] != means


def test_only_the_last_episode_is_played_quietly(runs) -> None:
    quiet = evaluate([runs["maml"]], Protocol(tasks=4, episodes=3, threads=1, quiet=True))
    noisy = evaluate([runs["maml"]], SMALL)
    same = np.array(quiet["returns"]) == np.array(noisy["returns"])
    assert same[:, :2].all()
    assert not same[:, 2].any()


def test_fine_tuning_starts_from_the_pretrained_policy_and_from_nothing(runs) -> None:
    report = evaluate([runs["maml"]], SMALL, finetune=[runs["blind"]])["finetuning"]
    assert set(report) == {"pretrained", "from scratch"}
    for baseline in report.values():
        assert baseline["inner_lr"] in STEP_SIZES
        assert len(baseline["episodes"]) == 3
        assert baseline["episodes"][0]["mean"] != baseline["episodes"][1]["mean"]
    blind, agent = runs["blind"].load_agent(), runs["maml"].load_agent()
    evaluator = Evaluator(runs["maml"].family, SMALL)
    blind.explores = True
    before = evaluator.play(agent.fine_tuned_from(blind, 0.1), 2).returns
    assert report["pretrained"]["episodes"][0]["mean"] == pytest.approx(before[0].mean(), abs=1e-3)


def test_only_what_adapts_by_gradient_can_be_compared_with_fine_tuning(runs) -> None:
    with pytest.raises(MetarobotError, match="agent 'rl2' has no gradient steps to fine-tune with"):
        evaluate([runs["rl2"]], SMALL, finetune=[runs["blind"]])
    with pytest.raises(MetarobotError, match="holds no policy to fine-tune"):
        evaluate([runs["maml"]], SMALL, finetune=[runs["rl2"]])


@pytest.mark.parametrize("name", ["tasks", "episodes"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(MetarobotError, match=f"{name} must be at least 1, not 0"):
        Protocol(**{name: 0})
