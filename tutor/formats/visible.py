"""Text as it may be shown: every character visible, no secret.

In: text of any origin: rows, answers, file names, metadata, output of other programs. Out: text for a terminal, a log,
a page or a JSON document. Writes nothing (terminal.py, html.py).
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

PICTURES = "\U0001f000-\U0001faff\u2600-\u27bf\u2b1b\ufe0f"
"""Pictures that a zero-width joiner makes one emoji of, as a range of a regular expression."""
_NOT_ASCII = re.compile(f"(?P<shape>(?<=[{PICTURES}])\u200d(?=[{PICTURES}])|\r\n)|[^ -~\n\t]")
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}"
    r"""|(?<=://)[^\s/:@"'\\]+:[^\s/@"'\\]+(?=@)"""
    r"""|(?P<header>(?i:authorization["']?\s*[:=]\s*["']?(?:(?:bearer|basic|token)\s+)?))[^\s"',;})\]\\]+"""
)
"""Tokens of the hub, name and password in a URL, and the value of an Authorization header."""
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OLLAMA_API_KEY")
"""Environment variables whose value is never shown."""
SECRET_LENGTH = 8
"""Minimum number of characters of a variable's value that is a secret: others are placeholders such as "ollama"."""
REDACTED = "[redacted]"
"""Text in place of a secret."""


def escaped(sign: str) -> str:
    r"""Return a character as the escape sequence that stands for it in a program: `\x1b`, `\u202e`."""
    return sign.encode("unicode_escape").decode()


def visible(text: str, shown: Callable[[str], str] = escaped) -> str:
    """Return the text with `shown` in place of each character without a visible shape.

    Newlines, tabs, and the joiner between two pictures of one emoji stay.
    """
    return _NOT_ASCII.sub(lambda found: found[0] if found["shape"] or found[0].isprintable() else shown(found[0]), text)


def redacted(text: str) -> str:
    """Return the text without the secrets that it holds."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= SECRET_LENGTH:
            text = text.replace(value, REDACTED)
    return SECRETS.sub(lambda found: f"{found['header'] or ''}{REDACTED}", text)


def clean(text: str) -> str:
    """Return the text for a terminal: no secret, no control character but newline and tab."""
    return visible(redacted(text))


def one_line(text: str) -> str:
    """Return the text for a terminal, with escapes for newlines and tabs too."""
    return re.sub(r"[\r\n\t]", lambda found: escaped(found[0]), clean(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON without secrets, whose invisible characters are JSON's escapes: parsers read the value."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return visible(redacted(text), lambda sign: json.dumps(sign)[1:-1])
