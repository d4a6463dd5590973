"""The names of a table's columns, and a record of it as an object.

In: the fields of the first record, then those of the others. Out: objects with the names as keys. Does not read files.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutor.errors import DataError
from tutor.formats.importing.names import KNOWN, NESTED, Options, folded
from tutor.formats.importing.shapes import BY_MAP
from tutor.formats.rows.json_values import printable


@dataclass(frozen=True)
class ColumnNames:
    """Names of the columns; "" for a column without one."""

    names: tuple[str, ...]

    def row(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return a record as an object; lists and objects, which a cell holds as JSON, are read."""
        found = {}
        for place, (name, value) in enumerate(zip(self.names, values, strict=True), 1):
            if value is None or (not name and value == ""):
                continue
            key = name or f"column {place}"
            found[key] = _nested(value) if folded(key) in NESTED else value
        return found


def column_names(fields: Sequence[Any], where: str, options: Options) -> ColumnNames:
    """Return the names in a table's first record. Raises DataError where they are none of a table of rows."""
    texts = tuple("" if field is None else str(field).strip() for field in fields)
    while texts and not texts[-1]:
        texts = texts[:-1]
    shown = ", ".join(printable(name) for name in texts[:10]) or "(none)"
    if twice := [name for name, count in Counter(texts).items() if name and count > 1]:
        raise DataError(f"{where}: two columns are named {printable(twice[0])}", "rename one of them")
    if missing := [column for column in options.columns.values() if column not in texts]:
        raise DataError(f"{where}: has no column {printable(missing[0])!r}, which --map names; found {shown}")
    if not options.columns and not any(folded(name) in KNOWN for name in texts):
        raise DataError(f"{where}: found the columns {shown}; none has a known name", BY_MAP)
    return ColumnNames(texts)


def _nested(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
