"""Rows as token ids, by the base's own tokenizer and the recipe's prompt.

In: a recipe, the folders of the stages data and base. Out: an encoder of rows; the ids of the held-out answers. Apart
from split_files.py, so that a stage that only reads rows does not depend on the tokenizer's package. Writes nothing.
"""

from pathlib import Path

from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.formats.models.prompt_format import read_format
from tutor.formats.rows.split_files import HELD_OUT, read_split
from tutor.prompt.encoding import RowEncoder
from tutor.recipe.settings import Recipe

TokenRows = list[tuple[list[int], list[int]]]
"""Prompt ids and answer ids (the end included), answer by answer."""


def row_encoder(recipe: Recipe, base: Path) -> RowEncoder:
    """Return the encoder of the rows of a recipe. Raises ArtifactError without the base stage's folder `base`."""
    tokenizer = load_tokenizer(read_facts(base)[1])
    return RowEncoder(tokenizer, read_format(recipe, base), recipe.system, recipe.data.loss)


def held_out_ids(recipe: Recipe, data: Path, base: Path) -> TokenRows:
    """Return the ids of the answers of the held-out rows, by the base's own tokenizer and the recipe's prompt."""
    encoder = row_encoder(recipe, base)
    return [pair for row in read_split(data, HELD_OUT) for pair in encoder.answers(row)]
