"""Checks of one text of a row, before any tokenizer is known.

In: a text as JSON gave it. Out: the text as it is trained, or a ValueError that says what it holds. Knows no base: the
tokens of its tokenizer are checked in control_tokens.py.
"""

import re

from pydantic import ValidationInfo

from tutor.formats.rows.json_values import printable
from tutor.prompt.messages import trim
from tutor.recipe.values import MARKED_TOKEN

TURNS_AS_TEXT = "turns as text"
"""Context of a validation for another prompt than the tutor's, in which the beginnings of its turns are text."""
UNWRITABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but tab and newline, and halves of surrogate pairs: JSON can escape them, no answer needs them."""


def clean_text(value: str) -> str:
    """Return a text with LF as its line end, without blanks at its ends. Raises ValueError."""
    return _checked(value).strip()


def clean_answer(value: str) -> str:
    """Return an answer with LF as its line end, as it is trained. Raises ValueError."""
    return trim(_checked(value))


def _checked(value: str) -> str:
    value = value.replace("\r\n", "\n")
    if found := UNWRITABLE.search(value):
        kind = "half of a surrogate pair" if found[0] >= "\ud800" else "a control character"
        raise ValueError(f"holds {printable(found[0])}, {kind}")
    if found := MARKED_TOKEN.search(value):
        raise ValueError(f"holds {found[0]}, which a tokenizer reads as a token of its own")
    return value


def some_text(value: str) -> str:
    """Return a text that has something to read. Raises ValueError."""
    if not any(sign.isprintable() and not sign.isspace() for sign in value):
        raise ValueError("is empty")
    return value


def without_marks(value: str, info: ValidationInfo, marks: tuple[str, ...]) -> str:
    """Return a text without the beginning of a turn of the tutor's prompt. Raises ValueError.

    With TURNS_AS_TEXT in the context of the validation every text is returned.
    """
    for mark in () if info.context == TURNS_AS_TEXT else marks:
        if mark in value:
            raise ValueError(f"has a line that begins with {mark.strip()!r}, as a turn of the prompt does")
    return value
