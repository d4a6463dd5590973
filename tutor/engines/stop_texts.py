"""Stop texts in a text that grows: where the answer ends, and what may be sent on before that is known.

In: the text so far, the stop texts. Out: a position, a number of characters. Sends nothing.
"""

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop text begins; None where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def withheld(text: str, stops: Sequence[str]) -> int:
    """Return the number of last characters that may be the beginning of a stop text."""
    return max((n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), default=0)
