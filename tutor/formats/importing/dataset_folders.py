"""Read folders that `datasets` saved (save_to_disk).

In: a folder. Out: each row as an object, with its number from 1. Reads in batches, decodes no image or sound. A module
of its own, for a recipe names files alone: its stages do not depend on the package.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tutor.errors import RecipeError
from tutor.formats.importing.names import Recognised
from tutor.formats.importing.tables import BATCH, damaged, numbered
from tutor.formats.rows.json_values import printable
from tutor.formats.rows.jsonl import Limits, LineValue

SPLITS = "dataset_dict.json"
"""File of a folder with several splits."""
STATE = "state.json"
"""File of a folder with one split."""


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
        yield from numbered(rows.iter(batch_size=BATCH), path, limits)
    except (arrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error, "datasets folder") from None


def _splits(path: Path) -> list[str]:
    try:
        names = json.loads((path / SPLITS).read_text("utf-8"))["splits"]
        return [printable(str(name)) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return ["unknown"]
