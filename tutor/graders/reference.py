"""Compare answers with the reference answers of their prompts: overlap of letter sequences (chrF).

In: answers and references, in the order of the prompts. Out: two scores an answer, 0 to 100: with its own reference,
and with that of another prompt. Does not know whether an answer is right: a right answer in other words has a low
score, a wrong one in the words of the reference a high score.
"""

from collections.abc import Sequence
from functools import cache
from typing import TypedDict

from sacrebleu.metrics.chrf import CHRF


class Overlap(TypedDict):
    """chrF2 of one answer, as sacrebleu computes it for a sentence: sequences of one to six letters."""

    chrf: float  # with the reference of its prompt
    chrf_other: float | None  # with the reference of another prompt, the control; None: there is no other reference


def grade_references(answers: Sequence[str | None], references: Sequence[str]) -> list[Overlap | None]:
    """Return the scores of each answer; None where there is no answer or the prompt has no reference ("").

    The other reference is half of the references away: prompts of one subject are often neighbours in a file.
    """
    distinct = list(dict.fromkeys(filter(None, references)))
    half = len(distinct) // 2
    other = {text: distinct[(place + half) % len(distinct)] for place, text in enumerate(distinct)} if half else {}
    return [
        None
        if answer is None or not reference
        else Overlap(
            chrf=_chrf(answer, reference),
            chrf_other=_chrf(answer, other[reference]) if other else None,
        )
        for answer, reference in zip(answers, references, strict=True)
    ]


def _chrf(answer: str, reference: str) -> float:
    return round(float(_metric().sentence_score(answer, [reference]).score), 2)


@cache
def _metric() -> CHRF:
    return CHRF()
