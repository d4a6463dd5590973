"""Read typed tables: Parquet files, and folders that `datasets` saved (save_to_disk).

In: a file or folder. Out: each row as an object, with its number from 1. Reads in batches. Does not interpret a row
(shapes.py), and decodes no image or sound.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutor.errors import DataError, RecipeError
from tutor.formats.importing.names import Recognised
from tutor.formats.rows.json_values import printable
from tutor.formats.rows.jsonl import Limits, LineValue

BATCH = 256
"""Number of rows in memory at a time."""
SPLITS = "dataset_dict.json"
"""File of a folder with several splits."""
STATE = "state.json"
"""File of a folder with one split."""


def read_parquet(path: Path, limits: Limits, recognised: Recognised) -> Iterator[LineValue]:
    """Yield number and object of each row. Raises DataError where the file is wrong."""
    import pyarrow as arrow
    import pyarrow.parquet

    recognised.container = "Parquet"
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from _numbered(table.iter_batches(batch_size=BATCH), path, limits)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error, "Parquet file") from None


def read_dataset_folder(path: Path, limits: Limits, recognised: Recognised) -> Iterator[LineValue]:
    """Yield number and object of each row. Raises RecipeError for another folder, DataError for a damaged one."""
    if (path / SPLITS).is_file():
        raise RecipeError(f"{path} holds several splits: {', '.join(_splits(path))}", "name the folder of one of them")
    if not (path / STATE).is_file():
        raise RecipeError(f"{path} is a folder that datasets' save_to_disk did not make", "name the file in it")
    import pyarrow as arrow
    from datasets import load_from_disk

    recognised.container = "a datasets folder"
    try:
        rows = load_from_disk(str(path), keep_in_memory=False).with_format("arrow")
        yield from _numbered(rows.iter(batch_size=BATCH), path, limits)
    except (arrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error, "datasets folder") from None


def _splits(path: Path) -> list[str]:
    try:
        names = json.loads((path / SPLITS).read_text("utf-8"))["splits"]
        return [printable(str(name)) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return ["unknown"]


def _numbered(batches: Any, path: Path, limits: Limits) -> Iterator[LineValue]:
    number = size = 0
    for batch in batches:
        size += batch.nbytes
        if size > limits.max_total_bytes:
            raise DataError(f"{path}: more than {limits.max_total_bytes} bytes once unpacked", "split it")
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _damaged(path: Path, error: BaseException, what: str) -> DataError:
    reason = printable(str(error).partition("\n")[0]) or type(error).__name__
    return DataError(f"{path}: {what} damaged ({reason})", "copy or save it again")
