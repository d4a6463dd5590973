"""Render HTML pages that need no other file: no script, no network, light and dark by page.css.

In: a template file, which may include page.css, and its values. Out: the text of the page. Escapes every value, because
rows and answers are texts of strangers. Writes no file.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

STYLES = Path(__file__).with_name("page.css")
PICTURE = "[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]"
JOINER = re.compile(f"(?<={PICTURE})\u200d(?={PICTURE})")
"""Zero-width joiner between two pictures, which makes one emoji of them; no other joiner is shown."""


def render_page(template: Path, **values: Any) -> str:
    """Return the text of a page; equal values give equal bytes."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, STYLES.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=visible,
    )
    return environment.get_template(template.name).render(values)


def visible(value: Any) -> Any:
    """Return a value for display: in a text, a replacement character for each character without a visible shape."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "\u200d".join(
        "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in part) for part in JOINER.split(value)
    )
