"""Find the longest run of text that an answer shares with a training text.

In: answers and training texts. Out: the longest copied run of each answer. Counts words and punctuation marks, not a
model's tokens: no tokenizer is needed, and models with different tokenizers can be compared. Pure.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

MIN_RUN = 6
"""Minimum length of a copied run in tokens (words and marks); any two texts on one subject share shorter ones."""

MAX_STARTS_PER_SEED = 4
"""Maximum start positions per seed in one answer; degenerate answers repeat a seed hundreds of times."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Copied:
    """The longest run of an answer that a training text has; `run` is 0 when none has MIN_RUN tokens."""

    run: int  # tokens
    total: int  # tokens of the answer
    line: int | None = None  # index of the training text
    text: str = ""  # the run as written in the answer

    @property
    def share(self) -> float:
        """Share of the answer that is copied, 0 to 1."""
        return self.run / self.total if self.total else 0.0


def longest_copies(answers: Sequence[str], training: Sequence[str]) -> list[Copied]:
    """For each answer the longest run that is also in one training text. Case counts; whitespace does not.

    The answers are indexed and the training texts are read once, so that memory does not grow with the training set.
    """
    spans = [[match.span() for match in _TOKEN.finditer(answer)] for answer in answers]
    tokens = [[answer[start:end] for start, end in found] for answer, found in zip(answers, spans, strict=True)]
    seeds = _seeds(tokens)
    best = [Copied(0, len(found)) for found in tokens]
    for line, text in enumerate(training):
        known = _TOKEN.findall(text)
        for start in range(len(known) - MIN_RUN + 1):
            for number, at in seeds.get(tuple(known[start : start + MIN_RUN]), ()):
                run = _run(known, start, tokens[number], at, longer_than=best[number].run)
                if run:
                    first, last = spans[number][at], spans[number][at + run - 1]
                    best[number] = Copied(run, len(tokens[number]), line, answers[number][first[0] : last[1]])
    return best


def _seeds(answers: Sequence[Sequence[str]]) -> dict[tuple[str, ...], list[tuple[int, int]]]:
    """Positions of each sequence of MIN_RUN tokens: number of the answer and index of the first token."""
    seeds: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, tokens in enumerate(answers):
        seen: Counter[tuple[str, ...]] = Counter()
        for at in range(len(tokens) - MIN_RUN + 1):
            seed = tuple(tokens[at : at + MIN_RUN])
            seen[seed] += 1
            if seen[seed] <= MAX_STARTS_PER_SEED:
                seeds[seed].append((number, at))
    return seeds


def _run(known: Sequence[str], start: int, tokens: Sequence[str], at: int, *, longer_than: int) -> int:
    """Number of equal tokens from these two positions; 0 unless it is greater than `longer_than`."""
    most = min(len(known) - start, len(tokens) - at)
    if most <= longer_than or known[start + longer_than] != tokens[at + longer_than]:
        return 0
    length = MIN_RUN
    while length < most and known[start + length] == tokens[at + length]:
        length += 1
    return length if length > longer_than else 0
