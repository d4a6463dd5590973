"""A user's rows as the data stage splits them: examples to train on, prompts to ask.

In: checked rows. Out: values whose fields are the keys of the split files. Checks nothing: rows.py does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tutor.prompt.messages import Message, questions_so_far


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its answer. `code`: expected compiler result of each fenced block, the question's first.

    A row of several turns has its last question and answer here, and all messages before them in `history`.
    """

    instruction: str
    response: str
    category: str = ""
    topic: str = ""
    code: tuple[str, ...] = ()
    line: int = 0  # in its file
    history: tuple[Message, ...] = ()  # perhaps a system text, then earlier questions and answers
    reasoning: str = ""  # of the answer

    @property
    def question(self) -> str:
        """All questions of the conversation in one text."""
        return questions(self)[-1]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question for evaluation. `expect`: conditions on a correct answer; `reference`: the author's answer, if any."""

    instruction: str
    category: str = ""
    topic: str = ""
    code: tuple[str, ...] = ()
    expect: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    line: int = 0
    history: tuple[Message, ...] = ()

    @property
    def question(self) -> str:
        """All questions of the conversation in one text."""
        return questions(self)[-1]


def questions(row: "Example | Prompt") -> list[str]:
    """Return, for each turn of a row's conversation, all questions up to it in one text."""
    return questions_so_far({"instruction": row.instruction, "history": row.history})
