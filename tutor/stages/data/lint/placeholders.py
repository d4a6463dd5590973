"""Placeholders that nobody filled in: `{{name}}`, `<your name>`, `[NOMBRE]`, NAME_1.

In: a Markdown text. Out: the first placeholder of its prose, or None. Code is left out: templates, generics and
arrays look alike there. A row with one is usable, so that it is a finding, not an error.
"""

import re

from markdown_it import MarkdownIt

from tutor.formats.rows.json_values import printable

_START = r"(?:your|insert|enter|tu|su|inserta|inserte|introduce|introduzca|escribe|escriba|nombre de|nombre del)[ _-]"
_WORDS = (
    r"NAME|NOMBRE|USER|USUARIO|COMPANY|EMPRESA|CITY|CIUDAD|DATE|FECHA|E-?MAIL|CORREO|PHONE|TEL[EÉ]FONO|ADDRESS"
    r"|DIRECCI[OÓ]N|LINK|ENLACE|AUTHOR|AUTOR|PLACEHOLDER|INSERT|INSERTAR|YOUR|TU"
)
PLACEHOLDER = re.compile(
    r"\{\{ ?[\w.-]{1,40}(?: [\w.-]{1,40}){0,3} ?\}\}"
    rf"|<(?i:{_START})[^<>\n]{{1,40}}>"
    rf"|(?<![\w\])])\[(?i:{_START})[^\[\]\n]{{1,40}}\](?![(\[:])"
    rf"|(?<![\w\])])\[(?:[A-ZÁÉÍÓÚÑ]+[ _]){{0,3}}(?:{_WORDS})(?:[ _][A-ZÁÉÍÓÚÑ\d]+){{0,3}}\](?![(\[:])"
    r"|\bNAME_\d+\b"
    r"|(?i:\blorem ipsum\b)"
)
"""Texts that stand for something else: template variables, hints in brackets, anonymised names, filler text."""


def find_placeholder(text: str) -> str | None:
    """Return the first placeholder in the prose of a Markdown text, as a message may show it."""
    if not PLACEHOLDER.search(text):
        return None  # parsing takes longer than the search
    for token in MarkdownIt("commonmark", {"html": False}).parse(text):
        prose = "".join(child.content if child.type == "text" else "\n" for child in token.children or ())
        if found := PLACEHOLDER.search(prose):
            return printable(found[0])
    return None
