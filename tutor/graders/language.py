"""Is an answer in Spanish: its prose alone, code and identifiers left out. Pure; the detector carries its models."""

import re

from lingua import Language, LanguageDetectorBuilder
from markdown_it import MarkdownIt

LANGUAGES = (
    Language.SPANISH,
    Language.ENGLISH,
    Language.PORTUGUESE,
    Language.FRENCH,
    Language.ITALIAN,
    Language.CATALAN,
)
"""What a Llama slides into, and Spanish's neighbours: among all 75, short technical prose often finds one more."""

MIN_WORDS = 6
"""With fewer words of prose there is no verdict, which counts as no: who only shows code has not taught in Spanish."""

_IDENTIFIER = re.compile(r"[0-9_$<>{}=/\\@|]|\w[(\[]|[a-záéíóúüñ][A-Z]|\w\.\w")
"""In a word that is code without its backticks: camelCase, a.b, f(), T[], TS2322, a path or an address."""
_WORD = re.compile(r"[^\W\d_]{2,}")


def is_spanish(text: str) -> tuple[bool, float]:
    """Whether a Markdown text's prose is Spanish, and the detector's confidence in Spanish, 0 to 1.

    Too little prose (MIN_WORDS) is (False, 0.0). A text that is half in another language is not Spanish.
    """
    words = prose(text)
    if len(_WORD.findall(words)) < MIN_WORDS:
        return False, 0.0
    # Low accuracy mode looks at trigrams alone: 15 MB instead of 160, and the same verdict from a paragraph on.
    detector = LanguageDetectorBuilder.from_languages(*LANGUAGES).with_low_accuracy_mode().build()
    confidence = float(detector.compute_language_confidence(words, Language.SPANISH))
    return confidence > 0.5, round(confidence, 4)


def prose(text: str) -> str:
    """A Markdown text's running words: no code block, inline code, tag, address or identifier."""
    parts = []
    # As HTML, the `<number>` of an unquoted Array<number> would be cut out and `Array` left.
    for token in MarkdownIt("commonmark", {"html": False}).parse(text):
        parts += [child.content if child.type == "text" else " " for child in token.children or ()]
        parts.append("\n")
    return " ".join(word for word in "".join(parts).split() if not _IDENTIFIER.search(word))
