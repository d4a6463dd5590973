"""Groups of equal questions, rows that evaluation asks too, samples, and the split into training and held-out rows.

In: the rows of a recipe. Out: the chosen rows, in the order of their file. Pure: the same rows and seed give the same
result. Reads and writes no file.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from tutor.errors import DataError
from tutor.formats.rows.examples import Example, Prompt, questions
from tutor.stages.data.normal_form import normalise, plain_words

RowType = TypeVar("RowType", Example, Prompt)
Key = TypeVar("Key", bound=Hashable)


def group_by_question(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Return the examples by normal form of their question, in the order of each question's first example."""
    groups: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[normalise(example.question)].append(example)
    return groups


def without_leaks(
    examples: Iterable[Example], prompts: Iterable[Prompt]
) -> tuple[list[Example], list[tuple[int, int]]]:
    """Return the examples that no prompt asks, and (line, line of the prompt) of the others."""
    asked = {normalise(prompt.question): prompt.line for prompt in prompts}
    found = [(example, _asked_line(example, asked)) for example in examples]
    leaks = [(example.line, line) for example, line in found if line is not None]
    return [example for example, line in found if line is None], leaks


def _asked_line(example: Example, asked: Mapping[str, int]) -> int | None:
    """Return the line of the prompt that asks what an example teaches, in any of its turns."""
    return next((line for text in questions(example) if (line := asked.get(normalise(text))) is not None), None)


def sample(examples: Sequence[RowType], rows: int, seed: int) -> list[RowType]:
    """Choose `rows` examples in proportion by category and topic, in their order; all for 0 or a larger number."""
    if not rows or rows >= len(examples):
        return list(examples)
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        groups[example.category, example.topic].append(place)
    quota = _spread(rows, {key: len(group) for key, group in groups.items()})
    chosen: set[int] = set()
    for key, group in groups.items():
        group.sort(key=lambda place: _rank(seed, f"{examples[place].question}\0{examples[place].line}"))
        chosen.update(group[: quota[key]])
    return [example for place, example in enumerate(examples) if place in chosen]


def _spread(total: int, sizes: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Distribute `total` in proportion to `sizes`, so that each cell and each category has its share within one row.

    Systematic sampling: rows at equal distances along the cells in order. The order of topics is rotated by one from
    category to category, because equal distances would otherwise choose the same topics in each.
    """
    topics = sorted({topic for _, topic in sizes})
    order = [
        (category, topic)
        for number, category in enumerate(sorted({category for category, _ in sizes}))
        for topic in (*topics[number % len(topics) :], *topics[: number % len(topics)])
        if (category, topic) in sizes
    ]
    ends = [0, *itertools.accumulate(sizes[cell] for cell in order)]
    taken = [(2 * total * end + ends[-1]) // (2 * ends[-1]) for end in ends]
    return {cell: taken[place + 1] - taken[place] for place, cell in enumerate(order)}


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training examples and about `share` held-out examples of each category, both in their order.

    Rows of one question stay together; a category with two questions or more is on both sides. The result depends on
    the rows and the seed, not on the order of the rows. Raises DataError for fewer than two questions.
    """
    questions = group_by_question(examples)
    if len(questions) < 2:
        found = f"{len(examples)} rows with {len(questions)} different questions"
        raise DataError(f"{found} cannot be split", "at least 2 are needed, one to train on and one held out")
    category = {question: min(each.category for each in group) for question, group in questions.items()}
    many = {name for name, count in Counter(category.values()).items() if count > 1}
    strata: defaultdict[str | None, list[str]] = defaultdict(list)
    for question, name in category.items():
        # A category of one question cannot be on both sides: all such questions share one stratum
        strata[name if name in many else None].append(question)
    rows = {question: len(group) for question, group in questions.items()}
    sizes = {stratum: sum(rows[question] for question in members) for stratum, members in strata.items()}
    least = {stratum: int(stratum is not None) for stratum in strata}
    quota = _apportion(max(1, round(share * len(examples))), sizes, least)
    words = {question: min(plain_words(each.question) for each in group) for question, group in questions.items()}
    chosen: set[str] = set()
    for stratum, members in strata.items():
        members.sort(key=lambda question: (_rank(seed, words[question]), question))
        chosen.update(_fill(members, rows, quota[stratum]))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[normalise(example.question) in chosen].append(example)
    return sides


def _fill(members: Sequence[str], sizes: Mapping[str, int], quota: int) -> list[str]:
    """Choose members in order that fit into `quota` rows: at least one if the quota is not 0, never all."""
    if not quota or len(members) < 2:
        return []
    chosen: list[str] = []
    for member in members:
        if sizes[member] <= quota and len(chosen) < len(members) - 1:
            chosen.append(member)
            quota -= sizes[member]
    return chosen or [min(members, key=lambda member: sizes[member])]


def _apportion(total: int, sizes: Mapping[Key, int], least: Mapping[Key, int]) -> dict[Key, int]:
    """Distribute `total` in proportion to `sizes` by largest remainder, with at least `least` for each."""
    whole = sum(sizes.values())
    given = {key: max(least.get(key, 0), total * size // whole) for key, size in sizes.items()}
    over = {key: total * size - given[key] * whole for key, size in sizes.items()}
    rest = max(0, total - sum(given.values()))
    for key in sorted(sizes, key=lambda key: (-over[key], str(key)))[:rest]:
        given[key] += 1
    return given


def _rank(seed: int, text: str) -> bytes:
    """Sort key of a shuffled order that depends on the seed and the text alone."""
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()
