"""stages/data/lint/near_duplicates.py: similar questions and groups of equal keys."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.outputs.lint_rows import WORDS

from tutor.stages.data.lint.linter import NEAR
from tutor.stages.data.lint.near_duplicates import Questions, groups_by_key, near_pairs, nearest
from tutor.stages.data.normal_form import normalise


def questions(texts: list[str]) -> Questions:
    made = Questions()
    for text in texts:
        made.add(normalise(text))
    return made


def similarity(one: str, other: str) -> float:
    first, second = (
        set(text.split()) | set(zip(text.split(), text.split()[1:], strict=False)) for text in (one, other)
    )
    return len(first & second) / len(first | second)


SHORT = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8).map(" ".join)


@given(st.lists(SHORT, min_size=1, max_size=6), st.lists(SHORT, min_size=1, max_size=6), st.floats(0.05, 1))
def test_nearest_equals_comparing_all(asked: list[str], others: list[str], least: float) -> None:
    made = questions([*asked, *others])
    count = len(asked)
    result = nearest(made, range(count), range(count, len(made)), least)
    for number, text in enumerate(asked):
        best = max(similarity(text, other) for other in others)
        assert result.get(number, (0, 0.0))[1] == pytest.approx(best if best >= least else 0.0)


def test_nearly_all_similar_pairs_are_found() -> None:
    chance = random.Random(1)
    texts = []
    for _ in range(300):
        words = chance.sample(WORDS, 12)
        texts += [" ".join(words), " ".join([*words[:11], "distinto"])]
    pairs = near_pairs(questions(texts), range(len(texts)), NEAR)
    assert len([number for number, (other, _) in pairs.items() if {number, other} == {number | 1, number & ~1}]) > 285
    assert all(
        similarity(texts[number], texts[other]) == pytest.approx(value) for number, (other, value) in pairs.items()
    )


def test_questions_on_different_subjects_are_not_similar() -> None:
    texts = [f"¿Qué es una {word} en TypeScript?" for word in WORDS]
    assert near_pairs(questions(texts), range(len(texts)), NEAR) == {}


def test_groups_by_key_are_in_order() -> None:
    from array import array

    keys = array("Q", [5, 1, 5, 2, 1, 5])
    assert list(groups_by_key(keys, range(6))) == [[0, 2, 5], [1, 4]]
    assert list(groups_by_key(keys, [4, 5, 0])) == [[5, 0]]
