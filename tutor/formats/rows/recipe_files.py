"""The row files that a recipe names.

In: a recipe. Out: paths of files that can be read. Reads no row, and imports no parser: every `tutor run` looks here.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tutor.errors import RecipeError
from tutor.formats.rows.jsonl import Limits, check_file

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

EVALUATION_LIMITS = Limits(max_total_bytes=2**24)
"""Limits of the files that [evaluate] names."""


def data_files(recipe: "Recipe") -> dict[str, Path]:
    """Return the files that the data stage reads: `train`, and `eval` where the recipe names it.

    Raises RecipeError or DataError where one cannot be read.
    """
    files = {}
    for key, name in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if not name:
            continue
        try:
            files[key] = recipe.resolve(name)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown user's ~, a NUL
            raise RecipeError(f"data.{key} is {name!r}: {error}", "name one file") from None
        check_file(files[key])
    return files


def paraphrase_files(recipe: "Recipe") -> dict[str, Path]:
    """Return the file of evaluate.paraphrases by its name; none where it is not set. Raises as `evaluation_files`."""
    return _checked(recipe, {"paraphrases": recipe.evaluate.paraphrases})


def general_files(recipe: "Recipe") -> dict[str, Path]:
    """Return the file of evaluate.general by its name; none where it is not set. Raises as `evaluation_files`."""
    return _checked(recipe, {"general": recipe.evaluate.general})


def evaluation_files(recipe: "Recipe") -> dict[str, Path]:
    """Return the files that [evaluate] names. Raises RecipeError or DataError for a file that cannot be read."""
    return {**paraphrase_files(recipe), **general_files(recipe)}


def _checked(recipe: "Recipe", given: Mapping[str, str]) -> dict[str, Path]:
    files = {name: recipe.resolve(path) for name, path in given.items() if path}
    for path in files.values():
        check_file(path, EVALUATION_LIMITS.max_total_bytes)
    return files


def named_files(recipe: "Recipe") -> list[Path]:
    """Return every file of rows that the recipe names, readable or not."""
    data, evaluate = recipe.data, recipe.evaluate
    found = []
    for name in filter(None, (data.train, data.eval, evaluate.paraphrases, evaluate.general)):
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            found.append(recipe.resolve(name))
    return found
