"""Stop texts in a text that grows: where the answer ends (prompt/format.py: what may be sent before that is known).

In: the text so far, the stop texts. Out: a position. Sends nothing.
"""

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop text begins; None where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
