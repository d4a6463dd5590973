"""The prompt format of a recipe, with what the base stage found in the base's own template.

In: a recipe, the base stage's folder. Out: the format; an encoder of rows. Renders nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.encoding import RowEncoder
from tutor.prompt.format import PromptFormat
from tutor.prompt.tutor_format import TUTOR

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe


def read_format(recipe: "Recipe", base: Path) -> PromptFormat:
    """Return the format of a recipe; `base` is the folder of the base stage. Raises ArtifactError without it."""
    if recipe.prompt == "tutor":
        return TUTOR
    facts, _ = read_facts(base)
    if not facts.prompt or facts.prompt["reasoning"] != recipe.reasoning:
        raise ArtifactError(
            f"{base / 'base.json'} is of another prompt or reasoning than {recipe.path}", "run: tutor base"
        )
    return BaseFormat.from_json(facts.prompt)


def row_encoder(recipe: "Recipe", base: Path) -> RowEncoder:
    """Return the encoder of the rows of a recipe, with the base's own tokenizer. Raises ArtifactError without it."""
    tokenizer = load_tokenizer(read_facts(base)[1])
    return RowEncoder(tokenizer, read_format(recipe, base), recipe.system, recipe.data.loss)
