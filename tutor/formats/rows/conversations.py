"""Rows of several turns: `messages` as the keys of a row of one turn, and the earlier messages as `history`.

In: a JSON object with `messages`. Out: the object with instruction, response, reasoning and history, or a RowError that
names the message. Knows no other format: importing/ changes other formats into this one.
"""

from collections.abc import Mapping
from typing import Any

from tutor.formats.rows.json_values import RowError, printable

MESSAGES = "messages"
"""Key of a row of several turns."""
ROLES = ("system", "user", "assistant")
"""Roles of messages: at most one system text, first; then user and assistant in turn."""
MESSAGE_KEYS = frozenset(("role", "content", "reasoning"))
"""Keys of a message."""
IMPORT = "tutor data import changes other forms of conversations into this one"
"""Next step for messages of another form."""


def flatten(row: Mapping[str, Any], *, answered: bool) -> dict[str, Any]:
    """Return a row with `messages` in the form of one turn; `answered`: its last message must be an answer.

    Raises RowError for a message of another form, and for roles out of turn.
    """
    if both := sorted(row.keys() & {"instruction", "response", "reasoning"}):
        raise RowError(f"has {MESSAGES} and {both[0]}", f"put the last question and answer into {MESSAGES} alone")
    messages = row[MESSAGES]
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{MESSAGES} is not a list of messages", IMPORT)
    for place, message in enumerate(messages):
        _check_message(f"{MESSAGES}[{place}]", message)
    turns = messages[messages[0]["role"] == "system" :]
    offset = len(messages) - len(turns)
    for place, message in enumerate(turns):
        expected = "assistant" if place % 2 else "user"
        if message["role"] != expected:
            raise RowError(
                f"{MESSAGES}[{place + offset}] is from the {message['role']}, not from the {expected}", IMPORT
            )
    if not turns:
        raise RowError(f"{MESSAGES} holds no question")
    if len(turns) % 2 and answered:
        raise RowError(f"{MESSAGES} ends with a question: its answer is missing")
    last = turns[-1] if len(turns) % 2 == 0 else {"content": ""}
    asked = messages[: len(messages) - (1 if len(turns) % 2 else 2)]
    question = messages[len(asked)]
    rest = {key: value for key, value in row.items() if key != MESSAGES}
    reasoning = {"reasoning": last["reasoning"]} if "reasoning" in last else {}
    return {**rest, "instruction": question["content"], "response": last["content"], **reasoning, "history": asked}


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
        raise RowError(f"{where} is no object with role and content", IMPORT)
    if unknown := sorted(message.keys() - MESSAGE_KEYS):
        raise RowError(f"{where} has the unknown key {printable(unknown[0])}", IMPORT)
    if message["role"] not in ROLES:
        raise RowError(f"{where} has the role {printable(str(message['role']))!r}; known: {', '.join(ROLES)}", IMPORT)
    if not isinstance(message["content"], str):
        raise RowError(f"{where} has a content that is no text", IMPORT)
    if "reasoning" in message and message["role"] != "assistant":
        raise RowError(f"{where} has reasoning, which only answers have")
