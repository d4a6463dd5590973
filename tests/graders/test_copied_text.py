"""graders/copied_text.py: the longest run that an answer shares with a training text, against comparing everything."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutor.graders import copied_text as overlap
from tutor.graders.copied_text import SHORTEST, Copied, longest_copies

TEXTS = st.lists(st.text(alphabet="abcd ", max_size=60), max_size=3)


def longest(answer: str, training: list[str]) -> int:
    """By comparing every place with every place."""
    words = re.findall(r"\w+|[^\w\s]", answer)
    best = 0
    for text in training:
        known = re.findall(r"\w+|[^\w\s]", text)
        for at in range(len(words)):
            for place in range(len(known)):
                run = 0
                while words[at + run : at + run + 1] == known[place + run : place + run + 1] != []:
                    run += 1
                best = max(best, run)
    return best if best >= SHORTEST else 0


@given(TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_it_is_the_longest_there_is(answers: list[str], training: list[str]) -> None:
    answers, training = ([" ".join(text.replace(" ", "")) for text in texts] for texts in (answers, training))
    found = [copy.run for copy in longest_copies(answers, training)]
    for run, answer in zip(found, answers, strict=True):
        true = longest(answer, training)
        # Of words that an answer repeats more than four times not every place is looked at.
        assert run == true or (len(answer) > 4 * SHORTEST and SHORTEST <= run < true)


def test_a_run_says_where_it_comes_from_and_is_as_the_answer_has_it() -> None:
    training = ["Nada.", "Una tupla es un array de longitud fija, con un tipo en cada posición."]
    answer = "Pues una tupla  es un array de longitud\nfija, dicen."
    assert longest_copies([answer], training) == [Copied(8, 12, 1, "tupla  es un array de longitud\nfija,")]
    assert longest_copies([answer], training)[0].share == 8 / 12


def test_a_short_run_is_what_any_two_texts_share() -> None:
    assert longest_copies(["const a: number = 1;"], ["let b: number = 2;"]) == [Copied(0, 7)]


def test_a_run_has_six_words_and_ends_where_either_text_ends() -> None:
    training = ["Una tupla es un array corto"]
    for answer, run in (
        ("Una tupla es un array corto", 6),
        ("una tupla es un array corto", 0),
        ("Una tupla es un array corto y fijo, sin más", 6),
        ("Aquí: Una tupla es un array corto", 6),
    ):
        assert longest_copies([answer], training)[0].run == run
    assert longest_copies(["Aquí: Una tupla es un array corto"], ["Una tupla es un array corto y fijo"])[0].run == 6


def test_an_answer_without_words_copies_nothing_of_nothing() -> None:
    assert longest_copies(["", " \n"], ["a"])[0].share == 0.0
    assert longest_copies([], ["a"]) == []


@dataclass
class Counted:
    """Words that count how often one of them is looked at."""

    words: Sequence[str]
    looks: list[int]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, place: int) -> str:
        self.looks[0] += 1
        return self.words[place]


def test_stuck_answers_do_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 times one word: without a limit on places and runs every word would be compared with every other."""
    calls, looks, run = [0], [0], overlap._run

    def counting(known: Sequence[str], place: int, words: Sequence[str], at: int, *, longer_than: int) -> int:
        calls[0] += 1
        return run(Counted(known, looks), place, Counted(words, looks), at, longer_than=longer_than)

    monkeypatch.setattr(overlap, "_run", counting)
    answers, words, training = 6, 500, 2
    found = longest_copies(["a " * words] * answers, ["a " * words] * training)
    assert [copy.run for copy in found] == [words] * answers
    assert calls[0] == answers * training * (words - SHORTEST + 1) * overlap.REPEATS
    # Two words a call to see that it gives no longer run, and one walk along each answer.
    assert looks[0] <= 2 * calls[0] + 2 * answers * words
