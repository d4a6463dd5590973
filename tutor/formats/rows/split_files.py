"""Files of the data stage's folder: their names, and how later stages read them.

In: the folder that the data stage wrote. Out: its rows. Writes nothing, and does not read a user's own files (rows.py).
"""

import json
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError

TRAIN = "train.jsonl"
"""File of the training rows."""
HELD_OUT = "held_out.jsonl"
"""File of the held-out rows."""
PROMPTS = "prompts.jsonl"
"""File of the evaluation prompts."""
STATISTICS = "statistics.json"
"""File of the counts and lengths of the rows."""
FIELDS = {TRAIN: ("instruction", "response"), HELD_OUT: ("instruction", "response"), PROMPTS: ("instruction",)}
"""Keys that each row of a file has, with a text."""


def read_split(data: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of one file of the split. Raises ArtifactError when it is missing or damaged."""
    rows = read_json_lines(data / name)
    for number, row in enumerate(rows, 1):
        if lacking := [key for key in FIELDS[name] if not isinstance(row.get(key), str)]:
            raise ArtifactError(f"{data / name} is damaged: row {number} lacks {lacking[0]}", "run: tutor data")
    return rows


def read_json_lines(path: Path, command: str = "tutor data") -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file that a stage wrote. Raises ArtifactError naming the command to run."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", f"run: {command}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ArtifactError(f"{path} is damaged: a line is no object", f"run: {command}")
    return rows
