"""engines/trace.py: steps, candidates, divergence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutor.engines.protocol import Finish
from tutor.engines.trace import Step, Trace, aligned, candidates, divergence, group_characters

distributions = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=9).map(
    lambda weights: {token: math.log(weight / (sum(weights) * 1.1)) for token, weight in enumerate(weights)}
)


def test_parts_of_a_character_are_grouped_into_one_step() -> None:
    tokens = [Step(" a", -1.0, ((" a", -1.0),)), Step("", -2.0), Step("", -3.0), Step("👩", -0.5), Step("", -9.0)]
    assert list(group_characters(tokens)) == [tokens[0], Step("👩", -5.5, tokens=3)]


def test_best_candidate_without_complete_character_is_kept() -> None:
    assert candidates([(" a", -1.0), ("\ufffd", -1.1), ("", -3.0), ("\ufffd\ufffd", -2.0)]) == (
        (" a", -1.0),
        ("", -1.1),
    )


def test_joined_step_keeps_the_candidates_of_its_first_token() -> None:
    top = (("", -1.0), ("*", -1.001))
    ours = Trace((Step("\ufffd", -1.0, top), Step("8", -0.1, (("8", -0.1),))), "length", 1)
    joined, other = (side.steps[0] for side in aligned(ours, steps("*", "x")))
    assert (joined.tokens, joined.distance(other)) == (2, pytest.approx(0.001))


def test_margin_is_distance_to_second_candidate() -> None:
    assert Step("a", -0.1, (("a", -0.1), ("b", -2.6))).margin == pytest.approx(2.5)
    assert Step("a", -0.1).margin is None


@given(distributions)
def test_divergence_from_itself_is_zero(one: dict[int, float]) -> None:
    assert divergence(one, one) == pytest.approx(0, abs=1e-12)


@given(distributions, distributions)
def test_divergence_of_shared_candidates_equals_formula(one: dict[int, float], other: dict[int, float]) -> None:
    shared = {key: one[key] for key in one if key in other}
    theirs = {key: other[key] for key in shared}
    rest = [1 - sum(map(math.exp, side.values())) for side in (shared, theirs)]
    parts = [math.exp(shared[key]) * (shared[key] - theirs[key]) for key in shared]
    expected = sum(parts) + rest[0] * math.log(rest[0] / rest[1])
    assert divergence(shared, theirs) == pytest.approx(max(expected, 0), abs=1e-9)


def test_divergence_without_shared_candidates_is_large() -> None:
    sure = {1: math.log(0.98), 2: math.log(0.01)}
    other = {7: math.log(0.98), 8: math.log(0.01)}
    assert divergence(sure, other) > 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1000.0])
def test_divergence_of_no_probability_is_nan(value: float) -> None:
    known, other = {1: -0.1, 2: -3.0}, {1: -0.1, 2: value}
    assert math.isnan(divergence(known, other))
    assert math.isnan(divergence(other, known))


def steps(*texts: str, finish: Finish | None = "length") -> Trace:
    return Trace(tuple(Step(text, -1.0) for text in texts), finish, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "texts"),
    [
        (("a", "b"), ("a", "b"), ("a", "b")),
        (
            ("\ufffd\n", "\ufffdra", " as", "\ufffd.", "b"),
            ("\ufffd\n\ufffdra as", "\ufffd", ".", "b"),
            ("\ufffd\n\ufffdra as", "\ufffd.", "b"),
        ),
        (("a", "\ufffd", "*", "b"), ("a", "*", "b"), ("a", "*", "b")),
        (("a", "\ufffd"), ("a", "\ufffdb", "c"), ("a",)),
        (("a\ufffd", ""), ("a", ""), ("a", "")),
    ],
    ids=["no broken character", "held back for longer", "left out", "one ends within a step", "end of both"],
)
def test_broken_characters_are_split_at_equal_places(
    ours: tuple[str, ...], theirs: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    for pair in (aligned(steps(*ours), steps(*theirs)), aligned(steps(*theirs), steps(*ours))):
        assert [tuple(step.text for step in side.steps) for side in pair] == [texts, texts]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (steps("\ufffda", "x"), steps("\ufffdb", "x")),
        (steps("a", "ab"), steps("a", "a", "b")),
        (steps("\ufffd", finish=None), steps("\ufffdb")),
        (steps("\ufffd", "", finish="eos"), steps("\ufffdb", "c")),
        (steps("\ufffda", "x"), steps("*", "x")),
    ],
    ids=["other text", "other tokens", "own token differs", "one has ended", "broken beside another"],
)
def test_differences_stay_differences(ours: Trace, theirs: Trace) -> None:
    pair = aligned(ours, theirs)
    assert pair[0].text != pair[1].text or [step.text for step in pair[0].steps] != [
        step.text for step in pair[1].steps
    ]
