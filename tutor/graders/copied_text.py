"""How much of an answer is copied: the longest run that it shares with any of the texts that a model was trained on.

In: training texts and answers. Out: for each answer its longest copied run. Counts words and signs, not a model's
tokens, so that models with different tokenizers can be compared and none is needed. Pure.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST = 6
"""Words and signs: shorter runs are what any two texts about one subject share (`): string {`)."""

REPEATS = 4
"""Of the same words in one answer so many places are looked at: a stuck answer has hundreds, and a run at each."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Copied:
    """An answer's longest run in a training text; `run` is 0 where none is SHORTEST or longer."""

    run: int  # words and signs
    of: int  # words and signs in the answer
    line: int | None = None  # which training text, from 0
    text: str = ""  # the run as the answer has it

    @property
    def share(self) -> float:
        """Of the answer, 0 to 1."""
        return self.run / self.of if self.of else 0.0


def longest_copies(answers: Sequence[str], training: Sequence[str]) -> list[Copied]:
    """For each answer the longest run that stands in one training text, too; case counts, kinds of blanks do not.

    The answers are indexed and the training texts read once: memory does not grow with the training set.
    """
    spans = [[match.span() for match in _TOKEN.finditer(answer)] for answer in answers]
    words = [[answer[start:end] for start, end in found] for answer, found in zip(answers, spans, strict=True)]
    seeds = _places(words)
    best = [Copied(0, len(said)) for said in words]
    for line, text in enumerate(training):
        known = _TOKEN.findall(text)
        for place in range(len(known) - SHORTEST + 1):
            for number, at in seeds.get(tuple(known[place : place + SHORTEST]), ()):
                run = _run(known, place, words[number], at, longer_than=best[number].run)
                if run:
                    first, last = spans[number][at], spans[number][at + run - 1]
                    best[number] = Copied(run, len(words[number]), line, answers[number][first[0] : last[1]])
    return best


def _places(words: Sequence[Sequence[str]]) -> dict[tuple[str, ...], list[tuple[int, int]]]:
    """Where SHORTEST words in a row stand: which answer, and from which of its words on."""
    places: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, said in enumerate(words):
        seen: Counter[tuple[str, ...]] = Counter()
        for at in range(len(said) - SHORTEST + 1):
            seed = tuple(said[at : at + SHORTEST])
            seen[seed] += 1
            if seen[seed] <= REPEATS:
                places[seed].append((number, at))
    return places


def _run(known: Sequence[str], place: int, said: Sequence[str], at: int, *, longer_than: int) -> int:
    """How many words from these two places on are the same; 0 unless there are more than `longer_than`."""
    most = min(len(known) - place, len(said) - at)
    if most <= longer_than or known[place + longer_than] != said[at + longer_than]:
        return 0
    length = SHORTEST
    while length < most and known[place + length] == said[at + length]:
        length += 1
    return length if length > longer_than else 0
