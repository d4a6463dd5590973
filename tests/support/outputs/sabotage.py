"""The table of the sabotage tests: what was broken, the gate in charge, its message.

In: rows, as the cases add them. Out: the table on stdout after the last case. Checks nothing.
"""

import sys
from collections.abc import Callable, Iterator

import pytest

from tutor.errors import TutorError

Report = Callable[[str, str, "pytest.ExceptionInfo[TutorError]"], None]
"""Adds a row: what was broken, the gate, its refusal."""


def printed_table() -> Iterator[Report]:
    """Yield what adds a row; print all rows at the end. For a fixture of a module."""
    rows: list[tuple[str, str, str]] = []
    yield lambda what, gate, caught: rows.append((what, gate, f"exit {caught.value.code}: {caught.value.message}"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [
        f"{what:<{widths[0]}} -> {gate:<{widths[1]}} -> {' '.join(message.split())[:230]}"
        for what, gate, message in rows
    ]
    sys.stdout.write("\n".join(["", *lines, ""]))
