"""Read a file of rows in any known form, and convert each row to one of tutor's own.

In: a file, and the options of the command. Out: line or number of each row, and an object
in our own form or a RowError. JSON Lines of our own rows come out as they are. Does not check texts (rows.py).
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tutor.errors import DataError
from tutor.formats.importing.delimited import read_delimited
from tutor.formats.importing.json_lists import find_list, read_list
from tutor.formats.importing.names import Options, Recognised
from tutor.formats.importing.shapes import convert
from tutor.formats.importing.spreadsheets import read_spreadsheet
from tutor.formats.importing.tables import read_parquet
from tutor.formats.rows.json_values import RowError, printable
from tutor.formats.rows.jsonl import Limits, LineValue, array_reader, opened, read_values, suffix

DELIMITED = frozenset((".csv", ".tsv", ".tab"))
"""Endings of tables as text."""
PARQUET = b"PAR1"
"""First bytes of a Parquet file."""
ZIP = b"PK\3\4"
"""First bytes of an .xlsx file."""
OLE = b"\xd0\xcf\x11\xe0"
"""First bytes of an older or encrypted Excel file."""
DEFAULT_OPTIONS = Options()


def open_rows(
    path: Path,
    limits: Limits,
    tolerated: Counter[str],
    options: Options = DEFAULT_OPTIONS,
    recognised: Recognised | None = None,
) -> Iterator[LineValue]:
    """Yield each row's line and value as `read_values` does, in our own form; fill `recognised` meanwhile.

    Raises DataError where the file as a whole is wrong.
    """
    recognised = recognised if recognised is not None else Recognised()
    for line, found in read_records(path, limits, tolerated, options, recognised):
        try:
            yield line, convert(found, options, recognised)
        except RowError as fault:
            yield line, fault


def read_records(
    path: Path, limits: Limits, tolerated: Counter[str], options: Options, recognised: Recognised
) -> Iterator[LineValue]:
    """Yield each row's line and value as the file has it. Raises as `open_rows`."""
    with opened(path, Counter()) as stream:
        begins = stream.read(len(OLE))
    if begins.startswith(PARQUET):
        yield from read_parquet(path, limits, recognised)
    elif begins.startswith(ZIP):
        yield from read_spreadsheet(path, limits, tolerated, options, recognised)
    elif begins == OLE:
        raise DataError(f"{path} is an old or encrypted Excel file", "save it as .xlsx without a password, or as CSV")
    elif suffix(path) in DELIMITED:
        yield from read_delimited(path, limits, tolerated, options, recognised)
    else:
        yield from _read_json(path, limits, tolerated, recognised)


def _read_json(path: Path, limits: Limits, tolerated: Counter[str], recognised: Recognised) -> Iterator[LineValue]:
    """Elements of the one list of a .json file; else its lines or its array."""
    recognised.container, recognised.numbered = "JSON Lines", "lines"
    if suffix(path) == ".json":
        packed = Counter[str]()
        with opened(path, packed) as stream:
            reader, first = array_reader(stream, path, limits, Counter())
            if first == "{" and (key := find_list(reader, limits.max_line_bytes)):
                recognised.container = f"JSON, the list {printable(key)}"
                tolerated.update(packed)
                yield from read_list(reader, key, limits.max_line_bytes)
                return
        recognised.container = "JSON" if first == "[" else "JSON Lines"
    yield from read_values(path, limits, tolerated)
