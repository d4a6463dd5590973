"""The held-out rows of the split as token ids.

In: the folders of the stages data and base. Out: prompt ids and answer ids, row by row. Apart from split_files.py, so
that a stage that only reads rows does not depend on the tokenizer's package. Writes nothing.
"""

from pathlib import Path

from tutor.formats.models.prompt_format import row_encoder
from tutor.formats.rows.split_files import HELD_OUT, read_split
from tutor.recipe.settings import Recipe

TokenRows = list[tuple[list[int], list[int]]]
"""Prompt ids and answer ids (the end included), answer by answer."""


def held_out_ids(recipe: Recipe, data: Path, base: Path) -> TokenRows:
    """Return the ids of the answers of the held-out rows, by the base's own tokenizer and the recipe's prompt."""
    encoder = row_encoder(recipe, base)
    return [pair for row in read_split(data, HELD_OUT) for pair in encoder.answers(row)]
