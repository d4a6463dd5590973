"""Read typed tables: Parquet files.

In: a file. Out: each row as an object, with its number from 1. Reads in batches. Does not interpret a row (shapes.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutor.errors import DataError
from tutor.formats.importing.names import Recognised
from tutor.formats.rows.json_values import printable
from tutor.formats.rows.jsonl import Limits, LineValue

BATCH = 256
"""Number of rows in memory at a time."""


def read_parquet(path: Path, limits: Limits, recognised: Recognised) -> Iterator[LineValue]:
    """Yield number and object of each row. Raises DataError where the file is wrong."""
    import pyarrow as arrow
    import pyarrow.parquet

    recognised.container = "Parquet"
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from numbered(table.iter_batches(batch_size=BATCH), path, limits)
    except (arrow.ArrowException, OSError) as error:
        raise damaged(path, error, "Parquet file") from None


def numbered(batches: Any, path: Path, limits: Limits) -> Iterator[LineValue]:
    """Yield number and object of each row of Arrow's batches. Raises DataError above the limit of bytes."""
    number = size = 0
    for batch in batches:
        size += batch.nbytes
        if size > limits.max_total_bytes:
            raise DataError(f"{path}: more than {limits.max_total_bytes} bytes once unpacked", "split it")
        for row in batch.to_pylist():
            number += 1
            yield number, row


def damaged(path: Path, error: BaseException, what: str) -> DataError:
    """Return the error of a file that its library cannot read."""
    reason = printable(str(error).partition("\n")[0]) or type(error).__name__
    return DataError(f"{path}: {what} damaged ({reason})", "copy or save it again")
