"""The two small files that [evaluate] may name: paraphrases of prompts, and texts about other subjects.

In: their paths. Out: rows whose every value is a text, or a DataError with file and line. Asks and scores nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import DataError
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import read_values
from tutor.formats.rows.recipe_files import EVALUATION_LIMITS, evaluation_files
from tutor.formats.rows.rows import PromptRow, parse_row

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

PARAPHRASE_KEYS = ("original", "instruction")
"""Required keys of a row of `evaluate.paraphrases`; every value is a text."""
GENERAL_KEYS = ("text", "language")
"""Required keys of a row of `evaluate.general`; every value is a text."""
KIND = "kind"
"""Optional key of a row of `evaluate.general`, a text: prose, a poem, code, ..."""


def check_files(recipe: "Recipe") -> None:
    """Raise RecipeError or DataError, with file and line, for a file of [evaluate] that the stage cannot use."""
    for name, path in evaluation_files(recipe).items():
        read_texts(path, PARAPHRASE_KEYS if name == "paraphrases" else GENERAL_KEYS)


def read_texts(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Read a small JSONL file whose rows have exactly these keys, each with a text. Raises DataError.

    A row of GENERAL_KEYS may also have KIND.
    """
    optional = {KIND} if keys == GENERAL_KEYS else set()
    rows, problems = [], []
    for line, value in read_values(path, EVALUATION_LIMITS, Counter()):
        if isinstance(value, RowError):
            problems.append(f"{path}:{line}: {value}")
        elif not isinstance(value, dict) or set(value) - optional != set(keys):
            problems.append(f"{path}:{line}: is not an object with only {' and '.join(keys)}")
        elif fault := _fault(value):
            problems.append(f"{path}:{line}: {fault}")
        else:
            rows.append(value)
    if problems:
        shown = tuple(problems[: EVALUATION_LIMITS.max_problems])
        raise DataError(f"{path}: {len(problems)} rows are not usable", "correct these lines", shown)
    return rows


def _fault(row: Mapping[str, Any]) -> str:
    """The first fault of a row's texts; "" where there is none."""
    for key, value in row.items():
        if not isinstance(value, str) or not value.strip():
            return f"{key} is no text"
    if len(row.get("text", "two words").split()) < 2:
        return "text is a single word: nothing to predict from"
    try:
        parse_row({"instruction": row.get("instruction", "-")}, PromptRow, Counter(), strict=True)
    except RowError as error:
        return str(error)
    return ""
