"""The held-out rows of the split as token ids.

In: the folders of the stages data and base. Out: prompt ids and answer ids, row by row. Apart from split_files.py, so
that a stage that only reads rows does not depend on the tokenizer's package. Writes nothing.
"""

from pathlib import Path

from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.formats.rows.split_files import HELD_OUT, read_split
from tutor.prompt.encoding import encode

TokenRows = list[tuple[list[int], list[int]]]
"""Prompt ids and answer ids (EOS included), row by row."""


def held_out_ids(data: Path, base: Path, system: str) -> TokenRows:
    """Return the ids of the held-out rows, by the base's own tokenizer and the prompt contract."""
    _, model = read_facts(base)
    tokenizer = load_tokenizer(model)
    rows = read_split(data, HELD_OUT)
    encoded = [encode(tokenizer, row["instruction"], row["response"], system) for row in rows]
    return [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in encoded]
