"""Read a sheet of an Excel file (.xlsx), with the names of the columns in its first row.

In: a file. Out: each row as an object, with its number in the sheet; values of formulas as Excel saved them. Reads row
by row; the texts of the whole file are in memory, as its format asks. Does not interpret a row (shapes.py).
"""

import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from tutor.errors import DataError
from tutor.formats.importing.names import Options, Recognised
from tutor.formats.importing.table_rows import ColumnNames, column_names
from tutor.formats.rows.json_values import RowError, printable
from tutor.formats.rows.jsonl import Limits, LineValue

MAX_CELL = 32_767
"""Maximum number of characters of a cell; Excel cuts longer texts without a message."""
ERRORS = frozenset(("#DIV/0!", "#N/A", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!"))
"""Values of cells whose formula failed."""
FAULTS = (
    zipfile.BadZipFile, zlib.error, ParseError, KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError,
    OSError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""Errors of openpyxl for a damaged file."""


def read_spreadsheet(
    path: Path, limits: Limits, tolerated: Counter[str], options: Options, recognised: Recognised
) -> Iterator[LineValue]:
    """Yield number and object of each row, or its RowError. Raises DataError where the file as a whole is wrong."""
    from openpyxl import load_workbook

    _check_archive(path, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and extensions, which are not read
            book = load_workbook(path, read_only=True, data_only=True)
    except FAULTS as error:
        raise _damaged(path, error) from None
    with closing(book):
        sheet = _sheet(book, path, options)
        recognised.container = f"Excel, sheet {printable(sheet.title)}"
        columns: ColumnNames | None = None
        for number, values in enumerate(_rows(sheet, path), 1):
            if all(value is None or not str(value).strip() for value in values):
                tolerated["blank"] += 1
            elif columns is None:
                columns = column_names(values, f"{path}:{number}", options)
            else:
                yield number, _record(columns, values)


def _check_archive(path: Path, limits: Limits) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(each.file_size for each in archive.infolist())
            is_book = "xl/workbook.xml" in archive.namelist()
    except FAULTS as error:
        raise _damaged(path, error) from None
    if not is_book:
        raise DataError(f"{path} is a ZIP archive, not an Excel file (.xlsx)", "unpack it, or save it as .xlsx or CSV")
    if size > limits.max_total_bytes:
        raise DataError(f"{path}: more than {limits.max_total_bytes} bytes once unpacked", "split it")


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: Excel file damaged ({printable(str(error)) or type(error).__name__})", "save it again")


def _sheet(book: Any, path: Path, options: Options) -> Any:
    """Return the sheet to read. Raises DataError where it is not clear which one is meant."""
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    if options.sheet:
        if options.sheet not in sheets:
            names = ", ".join(map(printable, sheets)) or "(none)"
            raise DataError(f"{path} has no sheet {printable(options.sheet)!r}; found {names}")
        filled = [options.sheet]
    else:
        filled = [name for name, sheet in sheets.items() if any(any(row) for row in _rows(sheet, path, last=2))]
    if len(filled) > 1:
        names = ", ".join(map(printable, filled))
        raise DataError(f"{path} has {len(filled)} sheets with rows: {names}", "tutor data import --sheet NAME")
    if not filled:
        raise DataError(f"{path}: 0 rows")
    return sheets[filled[0]]


def _rows(sheet: Any, path: Path, last: int | None = None) -> Iterator[Sequence[Any]]:
    try:
        sheet.reset_dimensions()  # some programs write a wrong size, and rows would be missing
        yield from sheet.iter_rows(values_only=True, max_row=last)
    except FAULTS as error:
        raise _damaged(path, error) from None


def _record(columns: ColumnNames, values: Sequence[Any]) -> object:
    width = len(columns.names)
    if any(value is not None for value in values[width:]):
        return RowError(f"has a value right of the {width} named columns", "name the column in the first row")
    cells = [*values[:width], *[None] * (width - len(values))]
    for name, value in zip(columns.names, cells, strict=True):
        if isinstance(value, str) and value in ERRORS:
            return RowError(f"{printable(name)} is {value}, the error of a formula")
        if isinstance(value, str) and len(value) >= MAX_CELL:
            return RowError(f"{printable(name)} has {len(value)} characters, Excel's limit for a cell: is it cut?")
    return columns.row([value if value is None or isinstance(value, str) else _text(value) for value in cells])


def _text(value: Any) -> str:
    """Return a number, date or truth value as Excel shows it without a format."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
