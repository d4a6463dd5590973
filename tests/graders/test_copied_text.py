"""graders/copied_text.py: the longest run that an answer shares with a training text, against brute force."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutor.graders import copied_text
from tutor.graders.copied_text import MIN_RUN, Copied, longest_copies

TEXTS = st.lists(st.text(alphabet="abcd ", max_size=60), max_size=3)


def longest(answer: str, training: list[str]) -> int:
    """The longest run by brute force: every pair of positions is compared."""
    words = re.findall(r"\w+|[^\w\s]", answer)
    best = 0
    for text in training:
        known = re.findall(r"\w+|[^\w\s]", text)
        for at in range(len(words)):
            for start in range(len(known)):
                run = 0
                while words[at + run : at + run + 1] == known[start + run : start + run + 1] != []:
                    run += 1
                best = max(best, run)
    return best if best >= MIN_RUN else 0


@given(TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_run_equals_longest_of_brute_force(answers: list[str], training: list[str]) -> None:
    answers, training = ([" ".join(text.replace(" ", "")) for text in texts] for texts in (answers, training))
    found = [copy.run for copy in longest_copies(answers, training)]
    for run, answer in zip(found, answers, strict=True):
        true = longest(answer, training)
        # Positions of a seed that an answer repeats more than four times are not all compared.
        assert run == true or (len(answer) > 4 * MIN_RUN and MIN_RUN <= run < true)


def test_run_has_its_training_text_and_text_of_the_answer() -> None:
    training = ["Nada.", "Una tupla es un array de longitud fija, con un tipo en cada posición."]
    answer = "Pues una tupla  es un array de longitud\nfija, dicen."
    assert longest_copies([answer], training) == [Copied(8, 12, 1, "tupla  es un array de longitud\nfija,")]
    assert longest_copies([answer], training)[0].share == 8 / 12


def test_run_below_minimum_is_not_reported() -> None:
    assert longest_copies(["const a: number = 1;"], ["let b: number = 2;"]) == [Copied(0, 7)]


def test_run_has_minimum_length_and_ends_with_either_text() -> None:
    training = ["Una tupla es un array corto"]
    for answer, run in (
        ("Una tupla es un array corto", 6),
        ("una tupla es un array corto", 0),
        ("Una tupla es un array corto y fijo, sin más", 6),
        ("Aquí: Una tupla es un array corto", 6),
    ):
        assert longest_copies([answer], training)[0].run == run
    assert longest_copies(["Aquí: Una tupla es un array corto"], ["Una tupla es un array corto y fijo"])[0].run == 6


def test_empty_answers_have_no_run() -> None:
    assert longest_copies(["", " \n"], ["a"])[0].share == 0.0
    assert longest_copies([], ["a"]) == []


@dataclass
class Counted:
    """A sequence that counts its accesses."""

    words: Sequence[str]
    accesses: list[int]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, start: int) -> str:
        self.accesses[0] += 1
        return self.words[start]


def test_work_for_degenerate_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One word 500 times: without limits on positions and runs every word would be compared with every other."""
    calls, accesses, run = [0], [0], copied_text._run

    def counting(known: Sequence[str], start: int, words: Sequence[str], at: int, *, longer_than: int) -> int:
        calls[0] += 1
        return run(Counted(known, accesses), start, Counted(words, accesses), at, longer_than=longer_than)

    monkeypatch.setattr(copied_text, "_run", counting)
    answers, words, training = 6, 500, 2
    found = longest_copies(["a " * words] * answers, ["a " * words] * training)
    assert [copy.run for copy in found] == [words] * answers
    assert calls[0] == answers * training * (words - MIN_RUN + 1) * copied_text.MAX_STARTS_PER_SEED
    # Two accesses per call that finds no longer run, and one pass over each answer.
    assert accesses[0] <= 2 * calls[0] + 2 * answers * words
