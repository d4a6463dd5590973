"""Control tokens of a base's tokenizer in the ids of a row.

In: the tokens that were added to a tokenizer's vocabulary, and ids. Out: the names of those that text alone does not
make. A row that holds one shows the model a role, an end or a file's name as one id, and no engine prints it. Loads no
tokenizer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tutor.errors import DataError

INSTEAD = "no engine prints it: write it in another way, as < name >, or delete the row"
"""Next step for a row with a control token."""
LISTED = 20
"""Maximum number of rows that an error lists."""
_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""Form of an added token that is a control token even if its tokenizer does not call it special. Other added tokens are
text: DeepSeek-Coder adds the letters ú and ü, others runs of blanks."""


END_TEXTS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<｜end▁of▁sentence｜>", "<EOT>", "<end_of_utterance>", "<eos>"),
)
"""Tokens that llama.cpp makes control tokens and ends an answer at by their text, whatever the GGUF says
(src/llama-vocab.cpp)."""


def llamacpp_control_texts(vocabulary: Mapping[str, int], added: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that only llama.cpp reads as one control token: Qwen's vocabulary has `</s>` as plain text."""
    known = set(added)
    return tuple(text for text in END_TEXTS if text in vocabulary and text not in known)


class AddedToken(Protocol):
    """The part of an added token of transformers or tokenizers that this module uses."""

    content: str
    special: bool


@dataclass(frozen=True)
class ControlTokens:
    """Names of the control tokens by id, and how often the prompt contract itself puts each into a row."""

    names: Mapping[int, str]
    own: Counter[int]
    texts: tuple[str, ...] = ()  # of tokens that only llama.cpp reads as control tokens

    def found(self, ids: Iterable[int], text: str) -> list[str]:
        """Return the names of the control tokens in a row, its text and ids, that the prompt did not put there."""
        extra = Counter(token for token in ids if token in self.names) - self.own
        return [*(self.names[token] for token in extra), *(each for each in self.texts if each in text)]


def refuse_rows(found: Sequence[tuple[str, Sequence[str]]], file: str = "") -> None:
    """Raise DataError for rows with control tokens, of `file` or of several; `found` has place and tokens of each."""
    problems = [f"{place}: holds {', '.join(names)}" for place, names in found if names]
    if problems:
        what = f"{len(problems)} of {len(found)} rows hold a control token of the base"
        raise DataError(f"{file}: {what}" if file else what, INSTEAD, tuple(problems[:LISTED]))


def control_tokens(
    added: Mapping[int, AddedToken], plain: Iterable[int], vocabulary: Mapping[str, int]
) -> ControlTokens:
    """Return the control tokens among the added ones and those of llama.cpp alone.

    `plain` are the ids of a row without any in its texts.
    """
    names = {
        token: each.content for token, each in added.items() if each.special or _MARKER.fullmatch(each.content.strip())
    }
    texts = llamacpp_control_texts(vocabulary, (each.content for each in added.values()))
    return ControlTokens(names, Counter(token for token in plain if token in names), texts)
