"""What the data stage wrote, as later stages read it. Writes nothing."""

import json
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.prompt import encode

Rows = list[tuple[list[int], list[int]]]
"""(prompt ids, answer ids with EOS), row by row."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that the data stage wrote. Raises ArtifactError when it is missing or damaged."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "run: tutor data") from None


def held_out_rows(held_out: Path, base: Path, system: str) -> Rows:
    """The ids of the held-out rows, by the base's own tokenizer and the prompt contract."""
    _, model = read_facts(base)
    tokenizer = load_tokenizer(model)
    encoded = [encode(tokenizer, row["instruction"], row["response"], system) for row in read_rows(held_out)]
    return [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in encoded]
