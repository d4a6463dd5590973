"""The base's own tokens in rows, as far as its tokenizer.json gives them.

In: a tokenizer.json, rows. Out: counts of tokens, and control tokens in the texts. The train stage checks rows again
with the tokenizer that it trains with (stages/train/audit.py). Reads no row's file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import ArtifactError
from tutor.formats.rows.control_tokens import control_tokens, refuse_rows
from tutor.formats.rows.examples import Example, Prompt
from tutor.prompt.format import PromptFormat, asked_messages
from tutor.prompt.messages import Message, row_answer, row_texts
from tutor.prompt.tutor_format import TUTOR

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenCounter = Callable[[Mapping[str, Any]], int]
"""Returns the tokens of a row in training, all its turns included."""
TokenFinder = Callable[[str], list[str]]
"""Returns the control tokens of the base in a text."""


@dataclass(frozen=True)
class BaseTokens:
    """The base's tokenizer.json, and how a recipe writes rows for it."""

    file: Path
    prompt: PromptFormat = TUTOR
    system: str = ""


def read_tokenizer(path: Path) -> "Tokenizer":
    """Return the tokenizer of a tokenizer.json. Raises ArtifactError where it is damaged."""
    from tokenizers import Tokenizer

    try:
        text = path.read_text("utf-8")
        json.loads(text)  # for a truncated file the package raises a bare Exception
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", "run: tutor base") from None
    return Tokenizer.from_str(text)


def token_counter(tokenizer: "Tokenizer", base: BaseTokens) -> TokenCounter:
    """Return a counter of a row's tokens, BOS and the end of the answer included."""

    def count(row: Mapping[str, Any]) -> int:
        asked = asked_messages(base.prompt, row, base.system)
        target = base.prompt.completion(row_answer(row))
        given = tokenizer.encode(base.prompt.render(asked)).ids, tokenizer.encode(target, add_special_tokens=False).ids
        return sum(map(len, given)) + 1

    return count


def longest_answer(
    tokenizer: "Tokenizer", base: BaseTokens, rows: Sequence[Example | Prompt], loss: str
) -> dict[str, int] | None:
    """Return the tokens of the longest trained answer, its end included, and the line of its row; None for prompts.

    `loss` is the recipe's data.loss: "last" trains the last answer of a row alone.
    """

    def answers(row: Example) -> list[Message]:
        earlier = [message for message in row.history if message["role"] == "assistant"]
        return [*(earlier if loss == "all" else ()), row_answer(asdict(row))]

    lengths = [
        (len(tokenizer.encode(base.prompt.completion(answer), add_special_tokens=False).ids) + 1, row.line)
        for row in rows
        if isinstance(row, Example)
        for answer in answers(row)
    ]
    tokens, line = max(lengths, key=lambda each: each[0], default=(0, 0))
    return {"tokens": tokens, "line": line} if lengths else None


def refusal(base: BaseTokens, row: Mapping[str, Any]) -> str | None:
    """Return why the prompt format cannot write a row; None where it can."""
    try:
        base.prompt.render(asked_messages(base.prompt, row, base.system))
    except ValueError as error:
        return str(error)
    return None


def control_token_finder(tokenizer: "Tokenizer") -> TokenFinder:
    """Return a finder of control tokens; it encodes only texts that have the text of one."""
    plain, vocabulary = tokenizer.encode("a").ids, tokenizer.get_vocab()
    tokens = control_tokens(tokenizer.get_added_tokens_decoder(), plain, vocabulary)
    names = [*(name.strip() for name in tokens.names.values()), *tokens.texts]
    texts = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def find(text: str) -> list[str]:
        return tokens.found(tokenizer.encode(text).ids, text) if texts.search(text) else []

    return find


def refuse_control_tokens(path: Path, rows: Sequence[Example | Prompt], find: TokenFinder) -> None:
    """Raise DataError with the rows of a file that hold a control token of the base."""
    refuse_rows([(f"{path}:{row.line}", find("\n".join(row_texts(asdict(row))))) for row in rows], str(path))
