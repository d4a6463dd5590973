"""engines/stop_texts.py: the first stop text, and beginnings of one at the end of a text."""

from tutor.engines.stop_texts import find_stop
from tutor.prompt.format import withheld

STOPS = ("\nInstrucción:", "fin")


def test_first_stop_text_is_found():
    assert find_stop("a fin\nInstrucción: b", STOPS) == 2
    assert find_stop("a\nInstrucción", STOPS) is None
    assert find_stop("a fin", ()) is None


def test_longest_beginning_of_a_stop_text_is_withheld():
    assert [withheld(text, STOPS) for text in ("a", "a\n", "a\nInst", "a f", "a fi", "fib")] == [0, 1, 5, 1, 2, 0]
    assert withheld("a fi", ()) == 0
