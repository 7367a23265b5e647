"""What all benches share: turns, warm-up, medians and ratios within a round."""

import itertools

import pytest

from metarobot.bench.harness import check_sizes, measure_rounds, median, median_ratio, timed
from metarobot.errors import MetarobotError


def test_the_first_round_warms_up_and_is_dropped() -> None:
    count = itertools.count()
    rounds = measure_rounds(lambda: {"a": next(count)}, 1e-9, least_rounds=3, show=False)
    assert [row["a"] for row in rounds] == [1, 2, 3]


def test_rounds_go_on_until_the_time_is_over() -> None:
    def measure() -> dict[str, float]:
        _, seconds = timed(lambda: sum(range(10_000)))
        return {"seconds": seconds}

    rounds = measure_rounds(measure, 0.1, least_rounds=1, show=False)
    assert len(rounds) > 1
    assert all(row["seconds"] > 0 for row in rounds)


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    # the machine was ten times slower in the last round: the ratio does not see it
    rounds = [
        {"ours": 2.0, "theirs": 4.0},
        {"ours": 3.0, "theirs": 4.0},
        {"ours": 0.2, "theirs": 0.4},
    ]
    assert median(rounds, "ours") == 2.0
    assert median_ratio(rounds, "ours", "theirs") == 0.5


@pytest.mark.parametrize(("worlds", "seconds"), [(0, 1.0), (1, 0.0), (-1, -1.0)])
def test_nothing_to_measure_is_refused(worlds: int, seconds: float) -> None:
    with pytest.raises(MetarobotError, match="worlds and seconds must be positive"):
        check_sizes(worlds, seconds)
