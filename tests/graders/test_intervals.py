"""Intervals for few prompts, against published values and simulations."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutor.graders import intervals
from tutor.graders.intervals import MIN_PAIRS, Difference, conclude, paired_values, paired_verdicts, wilson

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12)


def difference(better: int, worse: int, same: int) -> Difference:
    before = [False] * better + [True] * worse + [True] * same
    after = [True] * better + [False] * worse + [True] * same
    return paired_verdicts(before, after, 7)


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (9, 10, 0.5958, 0.9821), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_interval_of_a_rate_is_wilsons(passed: int, n: int, low: float, high: float) -> None:
    """The fourth is Newcombe's example (1998); the others follow from the formula by hand."""
    assert wilson(passed, n) == pytest.approx((low, high), abs=1e-4)


def test_interval_of_a_rate_is_inside_zero_and_one() -> None:
    assert wilson(0, 3)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@given(st.integers(1, 400), st.data())
def test_interval_of_a_rate_contains_the_rate(n: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, n))
    low, high = wilson(passed, n)
    assert 0 <= low <= passed / n <= high <= 1


def test_clear_difference_is_better_and_its_mirror_worse() -> None:
    better, worse = difference(20, 2, 8), difference(2, 20, 8)
    assert (better.n, better.higher, better.lower, better.mean) == (30, 20, 2, 0.6)
    assert conclude(better) == "better"
    assert conclude(worse) == "worse"
    assert conclude(better, more_is_better=False) == "worse"


def test_equal_verdicts_show_no_difference_with_an_interval() -> None:
    found = difference(0, 0, 10)
    assert conclude(found) == "no difference shown"
    assert (found.low, found.high) == (-0.2, 0.2)


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_few_prompts_show_no_difference_even_if_all_are_won(prompts: int) -> None:
    assert conclude(difference(prompts, 0, 0)) == "no difference shown"


def test_ten_wins_of_ten_have_an_interval_below_one() -> None:
    found = difference(10, 0, 0)
    assert conclude(found) == "better"
    assert found.low is not None
    assert found.low < 0.7


def test_unchanged_prompts_do_not_hide_a_difference() -> None:
    """Two models whose rates differ by 5 points, on the same easy and hard prompts: pairing shows it, rates do not."""
    assert conclude(difference(6, 0, 114)) == "better"


@given(PAIRS, st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_interval_depends_on_the_seed_and_not_on_the_order(pairs: list[tuple[bool, bool]], seed: int) -> None:
    before, after = zip(*pairs, strict=True)
    turned = paired_verdicts(before[::-1], after[::-1], seed)
    assert paired_verdicts(before, after, seed) == turned


@pytest.mark.slow
def test_interval_covers_the_true_difference_often_enough() -> None:
    draw, held = random.Random(3), 0
    for trial in range(100):
        outcomes = draw.choices([(False, True), (True, False), (True, True)], [0.3, 0.1, 0.6], k=24)
        before, after = zip(*outcomes, strict=True)
        found = paired_verdicts(before, after, trial)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.2 <= found.high
    assert held >= 88  # of 100; were it 95 in truth, fewer happen in 1 of 500 such tests


def test_difference_draws_one_sample_a_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Counting(random.Random):
        def choices(self, population: Any, *given: Any, k: int = 1, **more: Any) -> Any:
            drawn.append(k)
            return super().choices(population, *given, k=k, **more)

    monkeypatch.setattr(intervals.random, "Random", Counting)
    difference(40, 20, 60)
    assert drawn == [120] * intervals.RESAMPLES


def test_measurements_are_compared_pair_by_pair() -> None:
    before = [3.0 + number % 5 for number in range(20)]
    found = paired_values(before, [value + 0.1 for value in before], 7)
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert conclude(found, more_is_better=False) == "worse"


def test_measurements_in_both_directions_show_no_difference() -> None:
    before = [2.0] * 20
    after = [2.0 + (-1) ** number for number in range(20)]
    assert conclude(paired_values(before, after, 7), more_is_better=False) == "no difference shown"


def test_too_few_measurements_have_no_interval() -> None:
    found = paired_values([1.0] * (MIN_PAIRS - 1), [9.0] * (MIN_PAIRS - 1), 7)
    assert (found.low, found.high, conclude(found)) == (None, None, "no difference shown")
    assert paired_values([], [], 7).mean == 0.0
