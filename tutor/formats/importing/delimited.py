"""Read tables as text: CSV and TSV, in UTF-8, with the names of the columns in the first line.

In: a file, plain or gzip. Out: each record as an object, with the line where it begins. The delimiter is recognised
from the first records. Keeps one record and the first lines in memory. Does not interpret a record (shapes.py).
"""

import contextlib
import csv
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tutor.errors import DataError
from tutor.formats.importing.names import KNOWN, Options, Recognised, folded
from tutor.formats.importing.table_rows import ColumnNames, column_names
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import BOM, Limits, LineValue, Stream, opened, raw_lines, refuse_other_format

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""Delimiters that are looked for, and their names."""
SAMPLE_LINES = 100
"""Maximum number of lines from which the delimiter is recognised."""
SAMPLE_CHARACTERS = 2**18
"""Number of characters after which no further line is added to the sample."""
UTF_8 = "save it as UTF-8 (Excel: CSV UTF-8), or: iconv -f WINDOWS-1252 -t UTF-8 FILE > utf8.csv"
"""Next step for a table in another encoding."""


def read_delimited(
    path: Path, limits: Limits, tolerated: Counter[str], options: Options, recognised: Recognised
) -> Iterator[LineValue]:
    """Yield line and object of each record, or its RowError. Raises DataError where the file as a whole is wrong."""
    with opened(path, tolerated) as stream:
        texts = _texts(stream, path, limits, tolerated)
        sample = _sample(texts)
        offset = 0
        if sample and (marked := _marked_delimiter(sample[0])):
            sample, offset = sample[1:], 1
        delimiter = marked if offset else _delimiter(sample, {*KNOWN, *map(folded, options.columns.values())})
        recognised.container = f"{'TSV' if delimiter == chr(9) else 'CSV'} with {DELIMITERS[delimiter]}"
        recognised.numbered = "lines"
        csv.field_size_limit(limits.max_line_bytes)  # of the process: the module has no other limit
        reader = csv.reader(itertools.chain(sample, texts), delimiter=delimiter, strict=True)
        yield from _records(reader, path, offset, tolerated, options)


def _records(
    reader: "Reader", path: Path, offset: int, tolerated: Counter[str], options: Options
) -> Iterator[LineValue]:
    columns: ColumnNames | None = None
    while True:
        line = reader.line_num + offset + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if columns is None:
                raise DataError(f"{path}:{line}: is no CSV: {error}", _quote_hint(str(error))) from None
            yield line, RowError(f"is no CSV: {error}", _quote_hint(str(error)))
            continue
        if fields is None:
            return
        if not any(map(str.strip, fields)):
            tolerated["blank"] += 1
        elif columns is None:
            columns = column_names(fields, f"{path}:{line}", options)
        else:
            yield line, _record(columns, fields)


def _record(columns: ColumnNames, fields: Sequence[str]) -> object:
    if len(fields) < len(columns.names) or any(map(str.strip, fields[len(columns.names) :])):
        count = len(columns.names)
        return RowError(
            f"has {len(fields)} fields, the first line {count}", "quote a text that holds the delimiter or a line end"
        )
    return columns.row(fields[: len(columns.names)])


def _quote_hint(message: str) -> str:
    if "new-line" in message:
        return "the line ends are of an old Mac (CR): tr '\\r' '\\n' < FILE > rows.csv"
    return 'a quote in a quoted text is written twice ("")'


def _texts(stream: Stream, path: Path, limits: Limits, tolerated: Counter[str]) -> Iterator[str]:
    """Lines of a file as text. Raises DataError at the first byte that is not UTF-8."""
    position = 0
    for line, raw in enumerate(raw_lines(stream, path, limits), 1):
        if line == 1:
            refuse_other_format(raw, path)
            tolerated["bom"] += raw.startswith(BOM)
        try:
            yield raw.removeprefix(BOM).decode() if line == 1 else raw.decode()
        except UnicodeDecodeError as error:
            at = position + error.start + 1 + (len(BOM) if line == 1 and raw.startswith(BOM) else 0)
            byte = error.object[error.start]
            raise DataError(f"{path}:{line}: is not UTF-8 at byte {at} (0x{byte:02x})", UTF_8) from None
        position += len(raw)


def _sample(texts: Iterable[str]) -> list[str]:
    sample: list[str] = []
    size = 0
    for text in itertools.islice(texts, SAMPLE_LINES):
        sample.append(text)
        size += len(text)
        if size > SAMPLE_CHARACTERS:
            break
    return sample


def _marked_delimiter(line: str) -> str:
    """Return the delimiter of Excel's first line `sep=;`; "" for another line."""
    mark = line.rstrip("\r\n").removeprefix("sep=")
    return mark if line.startswith("sep=") and mark in DELIMITERS else ""


def _delimiter(sample: Sequence[str], known: Collection[str]) -> str:
    """Return the delimiter with which the first line has the most known names, and most records as many fields."""

    def score(delimiter: str) -> tuple[int, float, int]:
        records: list[list[str]] = []
        with contextlib.suppress(csv.Error):  # the records up to a fault count
            records.extend(csv.reader(sample, delimiter=delimiter))
        if not records:
            return 0, 0.0, 0
        same = sum(len(fields) == len(records[0]) for fields in records) / len(records)
        return sum(folded(name) in known for name in records[0]), same, len(records[0])

    return max(DELIMITERS, key=score)
