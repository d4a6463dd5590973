"""Which questions are nearly the same: sets of words and word pairs, compared by the share that they have in common.

Helper of lint.py. Texts go in one by one and are not kept: a row costs some hundred bytes. MinHash by one permutation
in bins (Li, Owen, Zhang 2012) with locality-sensitive bands finds the pairs that are worth comparing; what is reported
is always the true similarity (Jaccard) of the two sets. No library: the light ones are young, the kept ones need scipy.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from zlib import crc32

BINS = 24
BAND = 3
"""Bins a band. Of pairs of similarity 0.6 these 8 bands meet 86 %, of 0.7 97 %, of 0.8 99.7 %."""
WINDOW = 4
"""How many rows of the same band a row is compared with: what many rows share says little about any two of them."""


@dataclass
class Questions:
    """Questions by number, from 0 in the order in which they are added."""

    hashes: "array[int]" = field(default_factory=lambda: array("I"))  # of every question, sorted, one after the other
    ends: "array[int]" = field(default_factory=lambda: array("Q"))
    bands: "list[array[int]]" = field(default_factory=lambda: [array("Q") for _ in range(BINS // BAND)])

    def add(self, normalised: str) -> None:
        """Add a text whose words stand apart by one blank, as data.normalise leaves them."""
        words = normalised.encode().split()
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
        """The hashes of a question's words and word pairs."""
        return self.hashes[self.ends[number - 1] if number else 0 : self.ends[number]]


def _bins(hashes: Sequence[int]) -> list[int]:
    """The least hash of each residue class; an empty one takes that of the next class, marked by how far it came."""
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


def same(keys: "array[int]", chosen: Iterable[int]) -> Iterator[list[int]]:
    """Of the chosen numbers, those whose keys are equal: groups of two or more, each in the order of `chosen`."""
    first: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for number in chosen:
        key = keys[number]
        if first.setdefault(key, number) != number:
            groups.setdefault(key, [first[key]]).append(number)
    yield from groups.values()


def near_pairs(questions: Questions, chosen: Sequence[int], least: float) -> dict[int, tuple[int, float]]:
    """Of the chosen questions those that are like an earlier one: its number and the similarity, `least` or more."""
    found: dict[int, tuple[int, float]] = {}
    for band in questions.bands:
        for group in same(band, chosen):
            for place, number in enumerate(group[1:], 1):
                if number not in found:
                    others = ((other, questions.tokens(other)) for other in group[max(0, place - WINDOW) : place])
                    _keep_best(found, number, set(questions.tokens(number)), others, least)
    return found


def nearest(
    questions: Questions, asked: Sequence[int], others: Iterable[int], least: float
) -> dict[int, tuple[int, float]]:
    """For each question of `asked` the one of `others` that is most like it, and how much; none below `least`.

    Exact: two sets that share a part of `least` share one of the rarest tokens of either, so many that the rest is
    smaller than that part.
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
    """Note the one of `others` that is most like a question, where that is `least` or more."""
    for other, row in others:
        if least * len(tokens) <= len(row) and least * len(row) <= len(tokens):
            shared = len(tokens.intersection(row))
            similarity = shared / (len(tokens) + len(row) - shared)
            if similarity >= least and similarity > found.get(number, (0, 0.0))[1]:
                found[number] = (other, similarity)
