"""The prompt format of a recipe, with what the base stage found in the base's own template.

In: a recipe, the base stage's folder. Out: the format. Loads no tokenizer, so that stages without one can read it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.format import PromptFormat
from tutor.prompt.tutor_format import TUTOR

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe


def read_format(recipe: "Recipe", base: Path) -> PromptFormat:
    """Return the format of a recipe; `base` is the folder of the base stage. Raises ArtifactError without it."""
    if recipe.prompt == "tutor":
        return TUTOR
    found = read_json(base / "base.json").get("prompt")
    if not isinstance(found, dict) or found.get("reasoning") != recipe.reasoning:
        raise ArtifactError(
            f"{base / 'base.json'} is of another prompt or reasoning than {recipe.path}", "run: tutor base"
        )
    return BaseFormat.from_json(found)
