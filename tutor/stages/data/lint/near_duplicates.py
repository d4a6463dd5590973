"""Find similar questions: sets of words and word pairs, compared by Jaccard similarity.

In: normalised texts, one by one, none of which is kept. Out: pairs of numbers with their exact similarity. One
permutation MinHash in bins (Li, Owen, Zhang 2012) with locality-sensitive bands selects the pairs to compare. No
library: the small ones are young, the maintained ones need scipy. Some hundred bytes a row.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from zlib import crc32

BINS = 24
"""Number of bins of a MinHash."""
BAND = 3
"""Bins a band. The 8 bands find 86 % of the pairs of similarity 0.6, 97 % of 0.7, 99.7 % of 0.8."""
WINDOW = 4
"""Maximum number of earlier rows of one band that a row is compared with: a band of many rows means little."""


@dataclass
class Questions:
    """Hashed questions by number, from 0 in the order in which they are added."""

    hashes: "array[int]" = field(default_factory=lambda: array("I"))  # of every question, sorted, one after the other
    ends: "array[int]" = field(default_factory=lambda: array("Q"))
    bands: "list[array[int]]" = field(default_factory=lambda: [array("Q") for _ in range(BINS // BAND)])

    def add(self, normalised: str) -> None:
        """Add a text in normal form (normal_form.py): words and operators with one blank between them."""
        words = normalised.casefold().encode().split()
        pairs = [crc32(second, crc32(first + b" ")) for first, second in pairwise(words)]
        hashes = sorted({*map(crc32, words), *pairs})
        self.hashes.extend(hashes)
        self.ends.append(len(self.hashes))
        bins = _bins(hashes)
        for number, band in enumerate(self.bands):
            band.append(hash(tuple(bins[number * BAND : (number + 1) * BAND])) & (2**64 - 1))

    def __len__(self) -> int:
        return len(self.ends)

    def tokens(self, number: int) -> "array[int]":
        """Return the hashes of a question's words and word pairs, sorted."""
        return self.hashes[self.ends[number - 1] if number else 0 : self.ends[number]]


def _bins(hashes: Sequence[int]) -> list[int]:
    """Minimum hash of each residue class; an empty class takes the next one's, marked with the distance."""
    found = [-1] * BINS
    for value in reversed(hashes):
        found[value % BINS] = value
    first = next((place for place, value in enumerate(found) if value >= 0), 0)
    last = found[first] + (first << 32)
    for place in range(BINS - 1, -1, -1):
        value = found[place]
        last = value if value >= 0 else last + (1 << 32)
        found[place] = last
    return found


def groups_by_key(keys: "array[int]", chosen: Iterable[int]) -> Iterator[list[int]]:
    """Yield groups of two or more chosen numbers with equal keys, each in the order of `chosen`."""
    first: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for number in chosen:
        key = keys[number]
        if first.setdefault(key, number) != number:
            groups.setdefault(key, [first[key]]).append(number)
    yield from groups.values()


def near_pairs(questions: Questions, chosen: Sequence[int], least: float) -> dict[int, tuple[int, float]]:
    """Return the chosen questions similar to an earlier one: its number, and the similarity of at least `least`."""
    found: dict[int, tuple[int, float]] = {}
    for band in questions.bands:
        for group in groups_by_key(band, chosen):
            for place, number in enumerate(group[1:], 1):
                if number not in found:
                    others = ((other, questions.tokens(other)) for other in group[max(0, place - WINDOW) : place])
                    _keep_best(found, number, set(questions.tokens(number)), others, least)
    return found


def nearest(
    questions: Questions, asked: Sequence[int], others: Iterable[int], least: float
) -> dict[int, tuple[int, float]]:
    """Return for each question of `asked` the most similar one of `others`, and the similarity of at least `least`.

    Exact by prefix filtering: of two sets that share at least the part `least` of their tokens, the rarest tokens of
    either contain a shared one, if they are so many that the remaining ones are fewer than that part.
    """
    sets = {number: set(questions.tokens(number)) for number in asked}
    frequency = Counter(token for tokens in sets.values() for token in tokens)
    index: defaultdict[int, list[int]] = defaultdict(list)
    for number, tokens in sets.items():
        rarest = sorted(tokens, key=lambda token: (frequency[token], token))
        for token in rarest[: len(tokens) - ceil(least * len(tokens)) + 1]:
            index[token].append(number)
    found: dict[int, tuple[int, float]] = {}
    for other in others:
        row = questions.tokens(other)
        for number in {number for token in index.keys() & row for number in index[token]}:
            _keep_best(found, number, sets[number], ((other, row),), least)
    return found


def _keep_best(
    found: dict[int, tuple[int, float]],
    number: int,
    tokens: set[int],
    others: Iterable[tuple[int, "array[int]"]],
    least: float,
) -> None:
    """Record the most similar one of `others`, where the similarity is at least `least`."""
    for other, row in others:
        if least * len(tokens) <= len(row) and least * len(row) <= len(tokens):
            shared = len(tokens.intersection(row))
            similarity = shared / (len(tokens) + len(row) - shared)
            if similarity >= least and similarity > found.get(number, (0, 0.0))[1]:
                found[number] = (other, similarity)
