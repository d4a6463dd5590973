"""Conversations as messages, and answers as people see them.

In: questions, answers, rows. Out: messages, texts. Knows no prompt format: tutor_format.py and the others render.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = re.compile(r"\A(?:\s*\n)?(?:[^\S\t](?=\S))?")
"""Blank lines at the start, and a single blank: more blanks, or a tab, are the indentation of code."""

Message = Mapping[str, str]
"""A message: `role` (system, user or assistant), `content`, and perhaps the `reasoning` of an answer."""


def conversation(question: str, system: str = "") -> list[Message]:
    """Return one question as messages; an empty system text adds none."""
    return with_system([{"role": "user", "content": question}], system)


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Return messages that begin with a system text: their own, else `system` unless it is empty."""
    if not system or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def with_line(messages: Sequence[Message], line: str) -> list[Message]:
    """Return messages whose last question ends with `line` as a paragraph of its own; unchanged for an empty line."""
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n\n{line}"} if line else last]


def row_messages(row: Mapping[str, Any], system: str) -> list[Message]:
    """Return the messages of a row before its last answer; `system` where the row has no system text of its own."""
    return with_system([*row.get("history", ()), {"role": "user", "content": row["instruction"]}], system)


def row_answer(row: Mapping[str, Any]) -> Message:
    """Return the last answer of a row as a message."""
    reasoning = {"reasoning": row["reasoning"]} if row.get("reasoning") else {}
    return {"role": "assistant", "content": row["response"], **reasoning}


def row_questions(row: Mapping[str, Any]) -> list[str]:
    """Return all questions of a row's conversation."""
    return [message["content"] for message in row_messages(row, "") if message["role"] == "user"]


def questions_so_far(row: Mapping[str, Any]) -> list[str]:
    """Return, for each turn of a row's conversation, all questions up to it in one text; the last has all."""
    asked = row_questions(row)
    return ["\n\n".join(asked[: count + 1]) for count in range(len(asked))]


def row_texts(row: Mapping[str, Any]) -> list[str]:
    """Return all texts that the prompts and the answers of a row are made of."""
    messages = [*row_messages(row, ""), row_answer({"response": "", **row})]
    return [message[name] for message in messages for name in ("content", "reasoning") if message.get(name)]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError where roles do not alternate or a text is empty: Ollama would silently drop or join turns."""
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        if not turns[0]["content"]:
            raise ValueError("an empty system text is no message: leave it out")
        turns = turns[1:]
    if not turns:
        raise ValueError("a conversation needs a question")
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"turn {index + 1} must be from the {expected}, got {message['role']!r}")
        if not message["content"]:
            raise ValueError(f"turn {index + 1} ({expected}) is empty")


def trim(answer: str) -> str:
    """Return an answer without the blanks around it; an indentation of its first line, of two or more, stays."""
    return _BEFORE.sub("", answer).rstrip()


def display_start(answer: str) -> str:
    """Return the beginning of an answer for display, without the blank of the prompt format."""
    return _BEFORE.sub("", answer.removeprefix(" "))


def display_text(answer: str) -> str:
    """Return an answer for display, without the blank of the prompt format and the blanks behind it."""
    return display_start(answer).rstrip()
