"""Compile the code in the rows of a file with the TypeScript compiler.

In: rows. Out: counts, or every problem with its line. Does not run code; graders/code.py decides what is a problem.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutor.errors import DataError
from tutor.formats.rows.examples import Example, Prompt
from tutor.graders.code import CodeRow, check_rows, earlier_code


def check_code(path: Path, rows: Sequence[Example] | Sequence[Prompt]) -> dict[str, Any]:
    """Return how many blocks compiled or failed as their rows state, and the duration in seconds.

    Raises DataError where a block does not, HostError without a compiler.
    """
    started = time.monotonic()
    checked = check_rows(
        CodeRow(
            row.instruction,
            row.response if isinstance(row, Example) else row.reference,
            row.code,
            row.line,
            earlier_code(row.history),
        )
        for row in rows
    )
    if checked.problems:
        lines = len({line for line, _ in checked.problems})
        raise DataError(
            f"{path}: the code of {lines} rows does not do what they say",
            "correct the code or its `code` entry",
            tuple(f"{path}:{line}: {problem}" for line, problem in checked.problems[:20]),
        )
    return {
        "compiled": checked.compiled,
        "failed_as_stated": checked.failed_as_stated,
        "not_looked_at": checked.unchecked,
        "seconds": round(time.monotonic() - started, 2),
    }
