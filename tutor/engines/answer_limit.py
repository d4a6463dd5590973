"""Maximum tokens of an answer: the recipe's number, or for "auto" what the longest trained answer needs.

In: a recipe, the train stage's folder, which names its longest answer. Out: the recipe with a number. Counts no token:
the train stage and `tutor data check` do.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tutor.artifacts.manifest import read_manifest
from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.encoding import Encoded
from tutor.recipe.settings import GenerateSettings, Recipe

LONGEST = "longest_answer"
"""Key of the longest trained answer in the train stage's results: its `tokens`, and the `line` of its row."""
MARGIN = 10
"""Tokens beyond the longest trained answer, in percent of it; the sum is rounded up to a multiple of ten."""


def longest_answer(rows: Iterable[Encoded]) -> dict[str, int]:
    """Return the tokens of the longest answer of these rows, its end included, and the line of its row."""
    lengths = [(len(answer), row.line) for row in rows for _, answer in row.answers()]
    tokens, line = max(lengths, key=lambda each: each[0])
    return {"tokens": tokens, "line": line}


def answer_limit(longest: int) -> int:
    """Return the maximum tokens of an answer for a longest trained answer, with the margin."""
    return -(-longest * (100 + MARGIN) // 1000) * 10


def check_answers(recipe: Recipe, longest: Mapping[str, int], file: Path) -> str | None:
    """Return one line where the longest trained answer of a file would be cut; None where it fits.

    Raises RecipeError where max_new_tokens is "auto" and the context has no room for it.
    """
    generate = recipe.generate
    answer = f"{file}:{longest['line']}: the answer has {longest['tokens']} tokens"
    if generate.max_new_tokens == "auto":
        if answer_limit(longest["tokens"]) >= generate.context:
            raise RecipeError(
                f"{answer}, and generate.context is {generate.context}", "raise generate.context, or shorten the row"
            )
        return None
    if longest["tokens"] <= generate.max_new_tokens:
        return None
    return f'{answer}, generate.max_new_tokens cuts it at {generate.max_new_tokens}: raise it, or set it to "auto"'


def with_answer_limit(recipe: Recipe, train: Path) -> Recipe:
    """Return a recipe whose generate.max_new_tokens is a number; `train` is the folder of the train stage.

    Raises ArtifactError where it is "auto" and that stage has not run, RecipeError as `check_answers`.
    """
    if recipe.generate.max_new_tokens != "auto":
        return recipe
    manifest = read_manifest(train)
    longest: Any = manifest.results.get(LONGEST) if manifest else None
    if not isinstance(longest, Mapping) or not isinstance(longest.get("tokens"), int):
        raise ArtifactError(
            f"{train} names no longest answer, and generate.max_new_tokens is 'auto'", "run: tutor train"
        )
    check_answers(recipe, longest, recipe.resolve(recipe.data.train))
    generate = recipe.generate.model_copy(update={"max_new_tokens": answer_limit(longest["tokens"])})
    return recipe.model_copy(update={"generate": generate})


def max_new_tokens(settings: GenerateSettings) -> int:
    """Return the number in the settings of a recipe that went through `with_answer_limit`."""
    assert settings.max_new_tokens != "auto", "with_answer_limit comes first"
    return settings.max_new_tokens
