"""Render HTML pages that need no other file: no script, no network, light and dark by page.css.

In: a template file, which may include page.css, and its values. Out: the text of the page. Escapes every value, because
rows and answers are texts of strangers. Writes no file.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tutor.formats.visible import visible

STYLES = Path(__file__).with_name("page.css")


def render_page(template: Path, **values: Any) -> str:
    """Return the text of a page; equal values give equal bytes."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, STYLES.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=displayed,
    )
    return environment.get_template(template.name).render(values)


def displayed(value: Any) -> Any:
    """Return a value for display: in a text, a replacement character for each character without a visible shape."""
    return visible(value, lambda _: "�") if isinstance(value, str) and not isinstance(value, Markup) else value
