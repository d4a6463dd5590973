"""stages/data/splitting.py: leaks, splits and samples."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutor.errors import DataError
from tutor.formats.rows.examples import Example, Prompt
from tutor.stages.data import splitting
from tutor.stages.data.normal_form import normalise


def test_questions_that_differ_in_an_operator_are_no_leaks() -> None:
    examples = [Example(f"¿Cuánto es {sum_}?", "r", line=n) for n, sum_ in enumerate(("7+3", "7-3", "7 / 3"), 1)]
    kept, leaks = splitting.without_leaks(examples, [Prompt("cuanto es 7/3", line=9), Prompt("¿Cuánto es 7*3?")])
    assert kept == examples[:2]
    assert leaks == [(3, 9)]


SETS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["definicion", "ejemplo", "correccion", ""]), st.integers(0, 3)),
    min_size=2,
    max_size=60,
)


def examples_of(rows: list[tuple[int, str, int]]) -> list[Example]:
    """Examples with one category a question; some questions have two spellings."""
    category = {question: name for question, name, _ in rows}
    return [
        Example(f"¿Pregunta {question}{'?' * (answer % 2)}", f"r{answer}", category[question], f"t{answer}", (), line)
        for line, (question, _, answer) in enumerate(rows, 1)
    ]


@given(SETS, st.floats(0.01, 0.49), st.integers(0, 2**32 - 1))
def test_split_has_no_leak_keeps_order_covers_categories(
    rows: list[tuple[int, str, int]], share: float, seed: int
) -> None:
    examples = examples_of(rows)
    questions = {normalise(each.instruction): each.category for each in examples}
    if len(questions) < 2:
        with pytest.raises(DataError, match="cannot be split"):
            splitting.split(examples, share, seed)
        return
    train, held_out = splitting.split(examples, share, seed)
    assert train
    assert held_out
    assert not {normalise(each.instruction) for each in train} & {normalise(each.instruction) for each in held_out}
    assert sorted([*train, *held_out], key=lambda each: each.line) == examples
    assert [each.line for each in train] == sorted(each.line for each in train)
    for category, count in Counter(questions.values()).items():
        sides = [any(each.category == category for each in side) for side in (train, held_out)]
        assert all(sides) if count > 1 else any(sides)
    assert splitting.split(examples, share, seed) == (train, held_out)


@given(SETS, st.randoms(use_true_random=False))
def test_split_does_not_depend_on_the_order_of_rows(rows: list[tuple[int, str, int]], shuffler: random.Random) -> None:
    examples = examples_of(rows)
    if len({normalise(each.instruction) for each in examples}) < 2:
        return
    shuffled = list(examples)
    shuffler.shuffle(shuffled)
    assert set(splitting.split(examples, 0.2, 1)[1]) == set(splitting.split(shuffled, 0.2, 1)[1])


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(5, 80), min_size=1),
    st.floats(0.05, 0.45),
    st.integers(0, 99),
)
def test_held_out_share_of_each_category_is_within_one_row(sizes: dict[str, int], share: float, seed: int) -> None:
    examples = [Example(f"{name} {n}", "r", name) for name, size in sizes.items() for n in range(size)]
    _, held_out = splitting.split(examples, share, seed)
    found = Counter(each.category for each in held_out)
    for name, size in sizes.items():
        assert abs(found[name] - share * size) <= 1 + 0.5 * size / len(examples)
    assert abs(len(held_out) - share * len(examples)) <= 0.5 + len(sizes)


def test_split_of_a_seed_is_fixed_and_seeds_differ() -> None:
    examples = [Example(f"pregunta {n}", "r", "ab"[n % 2]) for n in range(20)]
    held_out = [each.instruction for each in splitting.split(examples, 0.2, 42)[1]]
    assert held_out == ["pregunta 5", "pregunta 6", "pregunta 10", "pregunta 13"]
    assert len({tuple(splitting.split(examples, 0.2, seed)[1]) for seed in range(10)}) > 5


def test_split_depends_on_words_and_not_on_operators() -> None:
    for question in ("pregunta {}", "¿pregunta + `{}`?"):
        examples = [Example(question.format(n), "r", "ab"[n % 2], line=n) for n in range(20)]
        assert [each.line for each in splitting.split(examples, 0.2, 42)[1]] == [5, 6, 10, 13]


def test_questions_of_equal_words_are_split_in_any_order_alike() -> None:
    examples = [Example(f"7 {sign} 3", "r", "a") for sign in "+-*/<>=%&|"]
    found = {frozenset(splitting.split(rows, 0.3, 1)[1]) for rows in (examples, examples[::-1])}
    assert [len(held_out) for held_out in found] == [3]


@pytest.mark.parametrize("share", [0.001, 0.99])
def test_split_sides_are_never_empty(share: float) -> None:
    for examples in (
        [Example(f"pregunta {n}", "r", "a") for n in range(5)],
        [Example(f"pregunta {n}", "r", str(n)) for n in range(5)],
        [Example("pregunta", str(n)) for n in range(5)] + [Example("otra", "r", "b")],
    ):
        assert all(splitting.split(examples, share, 1))


def test_split_of_one_question_is_refused() -> None:
    with pytest.raises(DataError, match="2 rows with 1 different questions cannot be split") as caught:
        splitting.split([Example("a", "b"), Example("¿A?", "c")], 0.1, 1)
    assert caught.value.code == 3


@pytest.mark.slow
@given(SETS, st.integers(1, 70), st.integers(0, 99))
def test_sample_has_its_size_in_proportion_and_in_order(
    rows: list[tuple[int, str, int]], count: int, seed: int
) -> None:
    examples = examples_of(rows)
    chosen = splitting.sample(examples, count, seed)
    assert len(chosen) == min(count, len(examples))
    assert [each.line for each in chosen] == sorted({each.line for each in chosen})
    assert chosen == splitting.sample(examples, count, seed)
    whole, part = (Counter((each.category, each.topic) for each in side) for side in (examples, chosen))
    for group, size in whole.items():
        assert abs(part[group] - size * len(chosen) / len(examples)) < 1
    whole, part = (Counter(each.category for each in side) for side in (examples, chosen))
    for name, size in whole.items():
        assert abs(part[name] - size * len(chosen) / len(examples)) < 1


def test_small_sample_has_every_category_and_topic() -> None:
    examples = [Example(f"{c}{t}{n}", "r", c, t) for c in "abcde" for t in "uvwxyz" for n in range(4)]
    chosen = splitting.sample(examples, 10, 42)
    assert Counter(each.category for each in chosen) == dict.fromkeys("abcde", 2)
    assert {each.topic for each in chosen} == set("uvwxyz")


def test_sample_of_zero_rows_is_all_rows() -> None:
    examples = [Example(str(n), "r") for n in range(5)]
    assert splitting.sample(examples, 0, 1) == examples


def test_prompt_that_any_turn_of_a_row_teaches_is_a_leak() -> None:
    history = ({"role": "user", "content": "¿Qué es any?"}, {"role": "assistant", "content": "Un tipo."})
    several = Example("¿Y eso?", "Otro.", line=1, history=history)
    for prompt, leaks in (
        (Prompt("¿que es ANY?", line=7), [(1, 7)]),
        (Prompt("¿Y eso?", line=8, history=history), [(1, 8)]),
        (Prompt("¿Y eso?", line=9), []),  # after another question it is another question
    ):
        assert splitting.without_leaks([several], [prompt])[1] == leaks
