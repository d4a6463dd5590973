"""The texts of a row under the names that they have in its file, and its turns.

In: a row of one turn or several. Out: texts and turns with their names (`response`, `messages[2]`). Checks nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutor.formats.rows.conversations import MESSAGES
from tutor.formats.rows.rows import ExampleRow, PromptRow
from tutor.prompt.messages import Message, row_answer, row_messages


@dataclass(frozen=True, slots=True)
class RowTurns:
    """A row as its turns; `named`: its file has it as `messages`."""

    row: Mapping[str, Any]  # instruction, response, reasoning, history
    named: bool

    @classmethod
    def of_row(cls, row: ExampleRow | PromptRow, *, named: bool) -> "RowTurns":
        """Return the conversation of a row that was read."""
        keys = ("instruction", "response", "reasoning")
        history = [message.model_dump(exclude_defaults=True) for message in row.history]
        return cls({**{key: getattr(row, key) for key in keys}, "history": history}, named)

    def messages(self) -> list[tuple[str, Message]]:
        """Return every message with its name; an answer that is missing is left out."""
        found = row_messages(self.row, "")
        if self.row["response"]:
            found.append(row_answer(self.row))
        names = ["instruction", "response"]
        return [(f"{MESSAGES}[{place}]" if self.named else names[place], each) for place, each in enumerate(found)]

    def texts(self) -> list[tuple[str, str]]:
        """Return every text with its name."""
        found = []
        for name, message in self.messages():
            if "reasoning" in message:
                found.append((f"{name}.reasoning" if self.named else "reasoning", message["reasoning"]))
            found.append((name, message["content"]))
        return found

    def turns(self) -> list[tuple[str, str]]:
        """Return each question with its answer in one text, and the name of the answer."""
        turns: list[tuple[str, str]] = []
        question = ""
        for name, message in self.messages():
            if message["role"] == "user":
                question = message["content"]
            elif message["role"] == "assistant":
                turns.append((name, f"{question}\n\n{message['content']}"))
        return turns

    def answers(self) -> str:
        """Return all answers in one text; "" without one."""
        return "\0".join(message["content"] for _, message in self.messages() if message["role"] == "assistant")


def shown_questions(found: Mapping[str, Any]) -> str:
    """Return the questions of a JSON object that need not be a usable row."""
    messages = found.get(MESSAGES)
    if not isinstance(messages, list):
        return str(found.get("instruction", ""))
    asked = (each for each in messages if isinstance(each, dict) and each.get("role") == "user")
    return "\n\n".join(str(each.get("content", "")) for each in asked)
