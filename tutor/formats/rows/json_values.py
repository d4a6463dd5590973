"""Decode one JSON value strictly, and explain what is wrong with it.

In: the bytes of a line, or a text and a position. Out: the value, or a RowError with the next step. Accepts no repeated
key, no NaN and no second value; does not read files (jsonl.py).
"""

import json
import re
from collections import Counter
from typing import Any

_BLANKS = re.compile("[ \t\n\r]*")
"""Whitespace of JSON."""
TOO_DEEP = "is nested too deeply"
"""Message of a value that is nested too deeply."""
ONE_LINE = "write one object a line: jq -c . FILE > rows.jsonl (jq -c '.[]' for an array, or name it .json)"
"""Next step where lines and JSON values differ."""
ICONV = "save it as UTF-8, from Windows for example: iconv -f WINDOWS-1252 -t UTF-8 FILE > rows.jsonl"
"""Next step for bytes that are no UTF-8."""


class RowError(ValueError):
    """Error of one row that is not usable. `unfinished`: its JSON ends before it is complete."""

    def __init__(self, message: str, hint: str | None = None, *, unfinished: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.unfinished = unfinished


def parse_line(content: bytes, max_bytes: int, *, ended: bool) -> Any:
    """Return the JSON value of one line; `ended`: the line has its line end. Raises RowError."""
    if len(content) > max_bytes:
        raise too_long(max_bytes)
    if b"\0" in content:
        raise RowError("holds a raw NUL byte")
    try:
        text = content.decode()
        value, end = decode_value(text, skip_blanks(text, 0))
    except UnicodeDecodeError as error:
        fault = not_utf8(error)
    except RowError as error:
        fault = error
    else:
        if skip_blanks(text, end) < len(text):
            raise RowError(f"more than one JSON value in the line, at column {end + 1}", ONE_LINE)
        return value
    if not ended and fault.unfinished and content.lstrip().startswith(b"{"):
        raise RowError("is unfinished: file cut?", "copy the file again, or delete its last line")
    raise fault


def too_long(max_bytes: int) -> RowError:
    """Return the error of a row that is longer than `max_bytes`."""
    return RowError(f"is longer than {max_bytes} bytes", "is a line end missing?")


def not_utf8(error: UnicodeDecodeError, offset: int = 0) -> RowError:
    """Return the row's error for bytes that are no UTF-8; `offset`: number of bytes before those of the error."""
    byte = error.object[error.start]
    cut = error.end == len(error.object) and error.reason == "unexpected end of data"
    return RowError(f"is not UTF-8 at byte {offset + error.start + 1} (0x{byte:02x})", ICONV, unfinished=cut)


def skip_blanks(text: str, at: int) -> int:
    """Return the first position from `at` on that is no JSON blank."""
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def decode_value(text: str, at: int, column: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at `at`, and its end; `column`: characters of its line before `text`.

    Raises RowError.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        rest = text[at : at + 2]
        if rest in ("//", "/*") or rest.startswith("#"):
            raise RowError("is a comment, which JSON does not have") from None
        place = error.colno + (column if error.lineno == 1 else 0)
        unfinished = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        raise RowError(f"is not JSON: {error.msg} at column {place}", unfinished=unfinished) from None
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    except ValueError as error:
        raise error if isinstance(error, RowError) else RowError("holds a number of too many digits") from None
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(f"has the key {printable(repeated)} twice", "keep one: which is meant is not ours to guess")
    return found


def _constant(name: str) -> Any:
    raise RowError(f"holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def printable(text: str) -> str:
    """Return a user's text as a message may show it: printable characters, one line, at most 40 of them."""
    return repr(text[:40])[1:-1] + ("…" if len(text) > 40 else "")


def kind(value: Any) -> str:
    """Return the type of a JSON value, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):  # after bool, which is an int too
        return f"the number {repr(value)[:20]}"
    if isinstance(value, str | list | dict):
        return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
    return f"a value of type {type(value).__name__}"
