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


class AddedToken(Protocol):
    """The part of an added token of transformers or tokenizers that this module uses."""

    content: str
    special: bool


@dataclass(frozen=True)
class ControlTokens:
    """Names of the control tokens by id, and how often the prompt contract itself puts each into a row."""

    names: Mapping[int, str]
    own: Counter[int]

    def found(self, ids: Iterable[int]) -> list[str]:
        """Return the names of the control tokens in the ids of a row that the prompt contract did not put there."""
        extra = Counter(token for token in ids if token in self.names) - self.own
        return [self.names[token] for token in extra]


def refuse_rows(found: Sequence[tuple[str, Sequence[str]]], file: str = "") -> None:
    """Raise DataError for rows with control tokens, of `file` or of several; `found` has place and tokens of each."""
    problems = [f"{place}: holds {', '.join(names)}" for place, names in found if names]
    if problems:
        what = f"{len(problems)} of {len(found)} rows hold a control token of the base"
        raise DataError(f"{file}: {what}" if file else what, INSTEAD, tuple(problems[:LISTED]))


def control_tokens(added: Mapping[int, AddedToken], plain: Iterable[int]) -> ControlTokens:
    """Return the control tokens among the added ones; `plain` are the ids of a row without any in its texts."""
    names = {
        token: each.content for token, each in added.items() if each.special or _MARKER.fullmatch(each.content.strip())
    }
    return ControlTokens(names, Counter(token for token in plain if token in names))
