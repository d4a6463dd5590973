"""Pages that need nothing else: one file, no script, no network, light and dark (page.css is what they share).

In: a template file and its values; it may include page.css. Out: the page's text. Every value is escaped: rows and
answers are texts of strangers.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

STYLES = Path(__file__).with_name("page.css")
PICTURE = "[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]"
JOINER = re.compile(f"(?<={PICTURE})\u200d(?={PICTURE})")
"""What makes one emoji of several: seen as what it joins."""


def render(template: Path, **values: Any) -> str:
    """The text of a page; the same values give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, STYLES.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=visible,
    )
    return environment.get_template(template.name).render(values)


def visible(value: Any) -> Any:
    """What is shown: in a text, a replacement character for each sign that has no shape of its own."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "\u200d".join(
        "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in part) for part in JOINER.split(value)
    )
