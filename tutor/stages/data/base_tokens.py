"""The base's own tokens in rows, as far as its tokenizer.json gives them.

In: a tokenizer.json, questions and answers. Out: counts of tokens, and control tokens in the texts. The train stage
checks rows again with the tokenizer that it trains with (stages/train/audit.py). Reads no row's file.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tutor.errors import ArtifactError
from tutor.formats.rows.control_tokens import control_tokens, refuse_rows
from tutor.formats.rows.examples import Example, Prompt
from tutor.prompt.messages import conversation
from tutor.prompt.tutor_format import completion, render

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenCounter = Callable[[str, str], int]
"""Returns the tokens of a question with its answer in training."""
TokenFinder = Callable[[str, str], list[str]]
"""Returns the control tokens of the base in a question with its answer."""


def read_tokenizer(path: Path) -> "Tokenizer":
    """Return the tokenizer of a tokenizer.json. Raises ArtifactError where it is damaged."""
    from tokenizers import Tokenizer

    try:
        text = path.read_text("utf-8")
        json.loads(text)  # for a truncated file the package raises a bare Exception
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", "run: tutor base") from None
    return Tokenizer.from_str(text)


def token_counter(tokenizer: "Tokenizer", system: str = "") -> TokenCounter:
    """Return a counter of a row's tokens, BOS and EOS included."""

    def count(question: str, answer: str) -> int:
        return len(tokenizer.encode(_text(question, answer, system)).ids) + 1

    return count


def control_token_finder(tokenizer: "Tokenizer") -> TokenFinder:
    """Return a finder of control tokens; it encodes only rows that have the text of one."""
    tokens = control_tokens(tokenizer.get_added_tokens_decoder(), tokenizer.encode(_text("a", "a")).ids)
    texts = re.compile("|".join(re.escape(name.strip()) for name in tokens.names.values()) or "(?!)")

    def find(question: str, answer: str) -> list[str]:
        text = _text(question, answer)
        return tokens.found(tokenizer.encode(text).ids) if texts.search(text) else []

    return find


def refuse_control_tokens(path: Path, rows: Sequence[Example | Prompt], find: TokenFinder) -> None:
    """Raise DataError with the rows of a file that hold a control token of the base."""
    refuse_rows([(f"{path}:{row.line}", find(*_texts(row))) for row in rows], str(path))


def _texts(row: Example | Prompt) -> tuple[str, str]:
    """All texts of a row as one question, and its answer."""
    earlier = [message[name] for message in row.history for name in ("content", "reasoning") if name in message]
    question = "\n".join((*earlier, row.instruction))
    return (question, "\n".join((row.reasoning, row.response))) if isinstance(row, Example) else (question, "")


def _text(question: str, answer: str, system: str = "") -> str:
    return render(conversation(question, system)) + completion(answer)
