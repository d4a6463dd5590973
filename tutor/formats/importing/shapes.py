"""Recognise what a row of a file is, and convert it to one of tutor's own rows.

In: a JSON object, or a table's row as one. Out: an object with `instruction` and `response`, or with `messages`, and
the keys of the row that have no meaning here; or a RowError that names what the row is. Guesses nothing where two keys
could hold one part. Does not check texts and roles: the rows' own check does.
"""

import json
from collections.abc import Mapping
from typing import Any

from tutor.formats.importing import names
from tutor.formats.importing.messages import (
    NO_MEDIA,
    NO_TOOLS,
    Turn,
    answer,
    is_canonical,
    read_history,
    read_messages,
    read_text,
)
from tutor.formats.importing.names import Options, Recognised, folded
from tutor.formats.rows.json_values import RowError, kind, printable

BY_MAP = "name the columns: tutor data import --map question=COLUMN,answer=COLUMN"
"""Next step where the parts of a row are not recognised."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
_BOOLEANS = (True, False, "true", "false", "True", "False")


def convert(found: Any, options: Options, recognised: Recognised) -> Any:
    """Return a row as one of tutor's own, and count its format. A value that is no object is returned as it is.

    Raises RowError.
    """
    if not isinstance(found, dict):
        return found
    keys: dict[str, str] = {}
    for key in found:
        keys.setdefault(folded(key), key)
    filled = {name for name, key in keys.items() if not _is_empty(found[key])}
    if options.columns:
        parts = _mapped(found, options.columns)
        described = "the columns of --map"
    else:
        _refuse_kind({name: found[keys[name]] for name in filled})
        if options.format in ("", "tutor") and _is_own(found, filled):
            recognised.formats[names.TUTOR] += 1
            return found
        parts, described = _recognise(found, keys, filled, options)
    for name, part in names.LABELS.items():
        if name in keys and part not in parts:
            parts[part] = keys[name]
    turns, described = _turns(found, parts, options.loss, described, recognised)
    if options.format in names.STYLES and not described.startswith(names.STYLES[options.format]):
        raise RowError(f"is {described}, not {options.format}")
    row = own_row(turns) | {part: value for part, value in _labels(found, parts).items() if value not in _EMPTY}
    recognised.formats[described] += 1
    rest = {key: value for key, value in found.items() if key not in parts.values() and not _is_empty(value)}
    # Counted here are keys that the rows' check would take for a part of the row
    named = {key for key in rest if key in row or ("messages" in parts and folded(key) in names.QUESTIONS)}
    ignored = rest.keys() if options.columns else named
    recognised.dropped.update(map(printable, ignored))
    return {**{key: value for key, value in rest.items() if key not in ignored}, **row}


def _is_empty(value: Any) -> bool:
    return value in _EMPTY or (isinstance(value, str) and not value.strip())


def _refuse_kind(filled: Mapping[str, Any]) -> None:
    """Raise RowError for a row of data for another kind of training."""
    pairs = filled.keys() & {*names.QUESTIONS, *names.ANSWERS, *names.TURNS}
    if all(any(name.startswith(start) for name in filled) for start in ("chosen", "rejected")):
        raise RowError("is a preference pair (chosen, rejected), not an answer to train on")
    if "kto_tag" in filled or (pairs and filled.get("label") in _BOOLEANS and "label" in filled):
        key = "kto_tag" if "kto_tag" in filled else "label"
        raise RowError(f"is a rated answer for KTO ({key}), not an answer to train on")
    if media := next((name for name in _MEDIA if name in filled), None):
        raise RowError(f"{NO_MEDIA} ({media})")
    if tools := next((name for name in ("tools", "functions") if name in filled and pairs), None):
        raise RowError(f"{NO_TOOLS}: declares {tools}")
    if not pairs and "text" in filled and not filled.keys() & {*names.EXTRAS}:
        raise RowError("is plain text for pre-training (text): a row needs a question and an answer")


def _is_own(found: Mapping[str, Any], filled: set[str]) -> bool:
    """Whether a row has our own keys, and no part under another key or in another form."""
    own = found.keys() & {"instruction", "response", "messages"}
    others = {*names.QUESTIONS, *names.ANSWERS, *names.EXTRAS, *names.TURNS, *names.SYSTEMS, "history"} - own
    if "messages" in own:
        return own == {"messages"} and not filled & {*others, *names.THOUGHTS} and is_canonical(found["messages"])
    response = found.get("response")
    thinks = isinstance(response, list) or (isinstance(response, str) and response.lstrip().startswith("<think>"))
    return bool(own) and not others & (filled if len(own) == 2 else set(map(folded, found))) and not thinks


def _mapped(found: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Return part -> key as --map names them. Raises RowError for a key that the row lacks."""
    for part, column in columns.items():
        if column not in found and part in ("question", "answer", "messages"):
            keys = ", ".join(printable(key) for key in list(found)[:8])
            raise RowError(f"lacks {printable(column)!r}, which --map names; found {keys or '(none)'}")
    return {part: column for part, column in columns.items() if column in found}


def _recognise(
    found: Mapping[str, Any], keys: Mapping[str, str], filled: set[str], options: Options
) -> tuple[dict[str, str], str]:
    """Return part -> key of a row, and its format described. Raises RowError."""
    wanted = options.format
    questions, answers = names.FORMATS.get(wanted, ((), ()) if wanted else (names.QUESTIONS, names.ANSWERS))
    turns = _only(names.TURNS, keys, filled, "the messages") if not wanted or wanted in names.STYLES else None
    question = reply = extra = None
    if turns in filled:
        clashing = (
            name for name in questions if name in filled and not _repeats(found[keys[name]], found[keys[turns]])
        )
        if other := next(clashing, None):
            raise RowError(f"has {turns} and {other}: which to train is not clear", BY_MAP)
    else:
        question = _only(questions, keys, filled, "the question")
        reply = _only(answers, keys, filled, "the answer")
        extra = _only(names.EXTRAS, keys, filled, "a second part of the question")
        if question is None and extra and not wanted:
            question, extra = extra, None
        turns = None if question in filled else turns
    if not turns and (question is None or (reply is None and options.answered)):
        shown = ", ".join(printable(key) for key in list(found)[:8]) or "(none)"
        expected = f"the keys of {wanted}" if wanted else "instruction,response or the keys of another known format"
        raise RowError(f"found key {shown}; expected {expected}", BY_MAP)
    parts = {
        "messages": turns,
        "question": question,
        "answer": reply,
        "input": extra,
        "history": "history" if "history" in keys and not turns else None,
        "system": _only(names.SYSTEMS, keys, filled, "the system text"),
        "reasoning": _only(names.THOUGHTS, keys, filled, "the reasoning"),
    }
    return {part: keys[name] for part, name in parts.items() if name}, _described(question, reply, turns)


def _repeats(question: Any, turns: Any) -> bool:
    """Whether a question is the first one of the messages."""
    asked = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [turn.get("content", turn.get("value")) for turn in asked[:2]]
    return isinstance(question, str) and question.strip() in [text.strip() for text in texts if isinstance(text, str)]


def _only(known: tuple[str, ...], keys: Mapping[str, str], filled: set[str], what: str) -> str | None:
    """Return the name of the list that a row has; the one with a value where it has several. Raises RowError."""
    present = [name for name in known if name in keys]
    full = [name for name in present if name in filled]
    if len(full) > 1:
        raise RowError(f"{' and '.join(full)} could both be {what}", BY_MAP)
    return full[0] if full else present[0] if present else None


def _described(question: str | None, reply: str | None, turns: str | None) -> str:
    if turns:
        return turns
    format_name = {"instruction": "Alpaca", "prompt": "prompt/completion", "question": "question/answer"}
    return f"{format_name.get(str(question), 'question/answer')} ({', '.join(filter(None, (question, reply)))})"


def _turns(
    found: Mapping[str, Any], parts: Mapping[str, str], loss: str, described: str, recognised: Recognised
) -> tuple[list[Turn], str]:
    """Return the messages of a row, and its format described."""
    if "messages" in parts:
        key = parts["messages"]
        turns = read_messages(_parsed(found[key]), printable(key), loss, recognised)
        described = f"{_style(_parsed(found[key]))} ({printable(key)})"
    else:
        turns = _pair(found, parts, loss, recognised)
    thought = read_text(_value(found, parts, "reasoning"), printable(parts.get("reasoning", "")))[0]
    if thought.strip():
        if not turns or turns[-1]["role"] != "assistant":
            raise RowError("holds a reasoning without an answer")
        last = turns[-1]
        turns[-1] = answer(last["content"], [thought, last.get("reasoning", "")], "the answer")
    system = read_text(_value(found, parts, "system"), printable(parts.get("system", "")))[0]
    if system.strip():
        if turns and turns[0]["role"] == "system" and turns[0]["content"].strip() != system.strip():
            raise RowError("has two system texts: one beside the messages, and one among them")
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
    return turns, described


def _pair(found: Mapping[str, Any], parts: Mapping[str, str], loss: str, recognised: Recognised) -> list[Turn]:
    """Return history, question and answer as messages; prompt and completion may be messages themselves."""
    question, reply = found[parts["question"]], _value(found, parts, "answer")
    given = _parsed(_value(found, parts, "history"))
    turns = [] if _is_empty(given) else read_history(given, loss, recognised)
    if _is_messages(question) or _is_messages(reply):
        both = [
            *(question if _is_messages(question) else [{"role": "user", "content": question}]),
            *(reply if _is_messages(reply) else [{"role": "assistant", "content": reply}] if "answer" in parts else []),
        ]
        return turns + read_messages(both, "messages", loss, recognised)
    texts = [read_text(question, printable(parts["question"]))[0]]
    texts.append(read_text(_value(found, parts, "input"), printable(parts.get("input", "")))[0])
    turns.append({"role": "user", "content": "\n\n".join(part for part in texts if part.strip())})
    if "answer" in parts:
        text, thoughts = read_text(reply, printable(parts["answer"]))
        turns.append(answer(text, thoughts, "the answer"))
    return turns


def _value(found: Mapping[str, Any], parts: Mapping[str, str], part: str) -> Any:
    return found.get(parts[part]) if part in parts else None


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _style(turns: Any) -> str:
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    return names.STYLES["openai" if "role" in first else "sharegpt"]


def _parsed(value: Any) -> Any:
    """Return a value; a text that is a JSON list, as tables have them, as that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def own_row(turns: list[Turn]) -> dict[str, Any]:
    """Return messages as the shorter of our two forms."""
    roles = [turn["role"] for turn in turns]
    if roles == ["user"]:
        return {"instruction": turns[0]["content"]}
    if roles != ["user", "assistant"]:
        return {"messages": turns}
    question, reply = turns
    thought = {"reasoning": reply["reasoning"]} if "reasoning" in reply else {}
    return {"instruction": question["content"], "response": reply["content"], **thought}


def _labels(found: Mapping[str, Any], parts: Mapping[str, str]) -> dict[str, Any]:
    """Return category, topic, id and code of a row; a number as category is its text."""
    labels = {part: found[parts[part]] for part in ("category", "topic", "id", "code") if part in parts}
    for part in ("category", "topic"):
        if isinstance(labels.get(part), int | float):
            labels[part] = str(labels[part])
    if "code" in labels:
        labels["code"] = _parsed(labels["code"])
    if "id" in labels and kind(labels["id"]).startswith("a value"):  # a date or a decimal of a table
        labels["id"] = str(labels["id"])
    return labels
