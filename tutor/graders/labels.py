"""Texts of the verdicts, for tables and reports.

In: the language of the answers. Out: texts. Grades nothing, and imports no grader: a summary needs the texts alone.
"""

from collections.abc import Mapping
from typing import Any

from tutor.recipe.values import LANGUAGES

LABELS = {
    "passed": "all that was asked",
    "language": "in its language",
    "stopped": "not cut",
    "ended": "ended by itself",
    "answered": "not empty",
    "code_block": "with code",
    "reference_code": "code as its reference",
    "fences_closed": "code fences closed",
    "no_loop": "without a loop",
    "no_leak": "no template text",
    "usual_length": "length as trained",
    "own_words": "not half copied",
    "compiles": "code compiles",
    "expected": "as expected",
}
"""Texts of the boolean verdicts, true is good, in the order in which they are shown."""

REFERENCE_LABEL = "chrF to its reference"
"""Text of the overlap of an answer with the reference answer of its prompt, 0 to 100."""
OTHER_REFERENCE_LABEL = "chrF to another's"
"""Text of the overlap of an answer with the reference answer of another prompt."""
REFERENCE_LIMITS = (
    "chrF is the overlap of letter sequences with one reference answer, not correctness: a right answer in other words "
    "scores low, a wrong one in similar words high."
)
"""What the overlap cannot show."""
FORM_LIMITS = "No prompt states what an answer must contain: all that was asked is form and language, not content."
"""What the verdicts cannot show where no prompt has an expectation."""


def limits(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what the figures of evaluated models cannot show, by the models' rates."""
    form = [FORM_LIMITS] if not any("expected" in model["all"] for model in models.values()) else []
    return [*form, *([REFERENCE_LIMITS] if all(model.get("reference") for model in models.values()) else [])]


def verdict_labels(language: str | None) -> dict[str, str]:
    """Return LABELS with the name of the language that answers must be in: an ISO 639-1 code, else it stays unnamed."""
    named = LANGUAGES.get(language or "")
    return {**LABELS, **({"language": f"in {named}"} if named else {})}
