"""The messages of a conversation in the forms of OpenAI, ShareGPT and their relatives.

In: a list of messages as a file has it. Out: messages with role, content and reasoning, or a RowError that names the
message. Does not check the order of the roles: the rows' own check does.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.formats.importing.names import THOUGHTS, Recognised, folded
from tutor.formats.rows.json_values import RowError, kind, printable

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
    "model": "assistant", "chatgpt": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
"""Role by its names."""
TOOL_ROLES = frozenset(
    ("tool", "tools", "function", "function_call", "tool_call", "observation", "tool_response", "function_response")
)
"""Roles of messages that call a tool or hold its result."""
MARKS = ("weight", "loss_weight", "train", "training", "loss")
"""Keys that mark whether a message carries loss."""
NO_TOOLS = "holds tool calls, which are not trained"
"""Reason for rows of tool-calling data."""
NO_MEDIA = "holds images, sound or video, which are not trained"
"""Reason for rows of multimodal data."""
_KEYS = frozenset(("role", "from", "content", "value", "tool_calls", "function_call", *THOUGHTS, *MARKS))
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>", re.DOTALL)
_TOOL_PARTS = frozenset(("tool_call", "tool_calls", "tool_use", "tool_result", "function_call"))
_THOUGHT_PARTS = frozenset(("thinking", "reasoning", "thought"))
_MEDIA = re.compile("image|audio|video|file")

Turn = dict[str, str]
"""A message: role, content and, where an answer has one, reasoning."""


def is_canonical(value: Any) -> bool:
    """Whether messages need no conversion."""
    return isinstance(value, list) and all(map(_is_canonical, value))


def _is_canonical(message: Any) -> bool:
    if not isinstance(message, dict) or not message.keys() <= {"role", "content", "reasoning"}:
        return False
    role, content = message.get("role"), message.get("content")
    thinks = role == "assistant" and isinstance(content, str) and content.lstrip().startswith("<think>")
    return role in ("system", "user", "assistant") and isinstance(content, str) and not thinks


def read_messages(value: Any, key: str, loss: str, recognised: Recognised) -> list[Turn]:
    """Return the messages of a list; `loss`: answers that the recipe trains. Raises RowError."""
    if not isinstance(value, list):
        raise RowError(f"{key} is {kind(value)}, not a list of messages")
    turns, trained = [], []
    for place, found in enumerate(value):
        for message in _messages(found):
            turn, mark = _read_message(message, f"{key}[{place}]", recognised)
            if turn["role"] == "system" and not turn["content"].strip():
                continue  # an empty system text is none
            turns.append(turn)
            trained.append(mark)
    return _with_loss(turns, trained, loss)


def _messages(found: Any) -> list[Any]:
    """Return the messages of an element: one, or two where it is a pair of input and output."""
    if not isinstance(found, dict) or not found.keys() >= {"input", "output"} or found.keys() & {"role", "from"}:
        return [found]
    rest = {key: value for key, value in found.items() if key not in ("input", "output")}
    return [{"role": "user", "content": found["input"]}, {**rest, "role": "assistant", "content": found["output"]}]


def _read_message(found: Any, where: str, recognised: Recognised) -> tuple[Turn, bool | None]:
    if not isinstance(found, dict):
        raise RowError(f"{where} is {kind(found)}, not an object with role and content")
    role_key = "role" if "role" in found else "from"
    content_key = "content" if "content" in found else "value"
    given = found.get(role_key)
    if not isinstance(given, str):
        keys = ", ".join(printable(str(name)) for name in list(found)[:5])
        raise RowError(f"{where} has the keys {keys or '(none)'}; expected role and content, or from and value")
    where = f"{where} ({printable(given)})"
    if folded(given) in TOOL_ROLES or found.get("tool_calls") or found.get("function_call"):
        raise RowError(f"{where} {NO_TOOLS}")
    role = ROLES.get(folded(given))
    if role is None:
        raise RowError(f"{where} has an unknown role; known: {', '.join(ROLES)}")
    text, thoughts = read_text(found.get(content_key), where)
    thoughts += [thought for key in THOUGHTS if (thought := _text(found.get(key), f"{where} {key}"))]
    turn = {"role": role, "content": text}
    if role == "assistant":
        turn = answer(text, thoughts, where)
    elif thoughts:
        raise RowError(f"{where} has reasoning, which only answers have")
    recognised.dropped.update(
        f"{printable(str(key))} of messages" for key in found.keys() - _KEYS if found[key] not in (None, "", [], {})
    )
    return turn, _mark(found, role, where)


def read_text(value: Any, where: str) -> tuple[str, list[str]]:
    """Return a content's text, and the reasonings among its parts. Raises RowError."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return _text(value, where), []
    texts, thoughts = [], []
    for part in value:
        named = part.get("type")
        name = named if isinstance(named, str) else ""
        if name in _TOOL_PARTS:
            raise RowError(f"{where} {NO_TOOLS}")
        if _MEDIA.search(name):
            raise RowError(f"{where} {NO_MEDIA} ({printable(name)})")
        if name == "text":
            texts.append(_text(_part_text(part, "text", "value"), where))
        elif name in _THOUGHT_PARTS:
            thoughts.append(_text(_part_text(part, name, "text", "value"), where))
        else:
            raise RowError(f"{where} has a part of the unknown type {printable(str(named))!r}")
    return "".join(texts), [thought for thought in thoughts if thought.strip()]


def _part_text(part: Mapping[str, Any], *keys: str) -> Any:
    return next((part[key] for key in keys if key in part), None)


def _text(value: Any, where: str) -> str:
    """Return a text with LF as its line end; "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind(value)}, not a text")
    return value.replace("\r\n", "\n")


def answer(text: str, thoughts: Sequence[str], where: str) -> Turn:
    """Return an answer, its reasoning apart: one of `thoughts`, or `<think>...</think>` at its start."""
    found = _THOUGHT.match(text)
    if found:
        text = text[found.end() :].lstrip("\n")
    elif text.lstrip().startswith("<think>"):
        raise RowError(f"{where} opens <think> and does not close it")
    both = [thought.strip() for thought in (*thoughts, *([found[1]] if found else ())) if thought.strip()]
    if len(set(both)) > 1:
        raise RowError(f"{where} has two reasonings", "keep one")
    return {"role": "assistant", "content": text, **({"reasoning": both[0]} if both else {})}


def _mark(found: Mapping[str, Any], role: str, where: str) -> bool | None:
    """Return whether a message is marked as trained; None without a mark. Raises RowError."""
    marks = {key: found[key] for key in MARKS if found.get(key) is not None}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{where} has {key} = {printable(str(value))}; an answer is trained (1) or not (0)")
        if value and role != "assistant":
            raise RowError(f"{where} has {key} = {printable(str(value))}: only answers are trained")
    values = set(map(bool, marks.values()))
    if len(values) > 1:
        raise RowError(f"{where} has marks that differ: {', '.join(marks)}")
    return values.pop() if values else None


def _with_loss(turns: list[Turn], marks: list[bool | None], loss: str) -> list[Turn]:
    """Return the turns up to the last trained answer. Raises RowError for marks that a row cannot express."""
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    left = [place for place in answers if marks[place] is False]
    trained = [place for place in answers if marks[place] is not False]
    if not left:
        return turns
    if not trained:
        raise RowError("every answer is marked as not trained")
    turns = turns[: trained[-1] + 1]
    expected = trained[-1:] if loss == "last" else [place for place in answers if place < len(turns)]
    if trained != expected:
        only_last = len(trained) == 1
        raise RowError(
            f"answer {answers.index(left[0]) + 1} is marked as not trained, among trained ones",
            'import with --loss last, and train with data.loss = "last"' if only_last else None,
        )
    return turns


def read_history(value: Any, loss: str, recognised: Recognised) -> list[Turn]:
    """Return the turns before a question: messages, or pairs of question and answer. Raises RowError."""
    if not isinstance(value, list):
        raise RowError(f"history is {kind(value)}, not a list of turns")
    if all(isinstance(item, dict) for item in value):
        return read_messages(value, "history", loss, recognised)
    turns: list[Turn] = []
    for place, pair in enumerate(value):
        where = f"history[{place}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"{where} is not a pair of question and answer")
        turns.append({"role": "user", "content": _text(pair[0], where)})
        turns.append(answer(_text(pair[1], where), (), where))
    return turns
