"""Detect whether the prose of a text is Spanish.

In: a Markdown text. Out: a verdict and the detector's confidence; code and identifiers are left out. Pure: the detector
brings its models. Does not identify another language.
"""

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
"""Languages to choose from: those that a Llama changes to, and the neighbours of Spanish. With all 75, the detector
often classifies short technical prose as another language."""

MIN_WORDS = 6
"""Minimum words of prose for a verdict. An answer with fewer counts as not Spanish: code alone teaches nothing."""

_IDENTIFIER = re.compile(r"[0-9_$<>{}=/\\@|]|\w[(\[]|[a-záéíóúüñ][A-Z]|\w\.\w")
"""Part of a word that is code without backticks: camelCase, a.b, f(), T[], TS2322, a path or an address."""
_WORD = re.compile(r"[^\W\d_]{2,}")


def is_spanish(text: str) -> tuple[bool, float]:
    """Whether a Markdown text's prose is Spanish, and the detector's confidence in Spanish, 0 to 1.

    Returns (False, 0.0) for fewer than MIN_WORDS words. A text that is half in another language is not Spanish.
    """
    words = prose(text)
    if len(_WORD.findall(words)) < MIN_WORDS:
        return False, 0.0
    # Low accuracy mode uses trigrams only: 15 MB instead of 160, and equal verdicts for texts of a paragraph or more.
    detector = LanguageDetectorBuilder.from_languages(*LANGUAGES).with_low_accuracy_mode().build()
    confidence = float(detector.compute_language_confidence(words, Language.SPANISH))
    return confidence > 0.5, round(confidence, 4)


def prose(text: str) -> str:
    """The prose of a Markdown text, without code blocks, inline code, tags, addresses and identifiers."""
    parts = []
    # With HTML, the `<number>` of an unquoted Array<number> would be removed and `Array` left.
    for token in MarkdownIt("commonmark", {"html": False}).parse(text):
        parts += [child.content if child.type == "text" else " " for child in token.children or ()]
        parts.append("\n")
    return " ".join(word for word in "".join(parts).split() if not _IDENTIFIER.search(word))
