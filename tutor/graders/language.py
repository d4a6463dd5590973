"""Detect whether the prose of a text is in a given language.

In: a Markdown text and an ISO 639-1 code. Out: a verdict and the detector's confidence; code and identifiers are left
out. Pure: the detector brings its models. Does not identify another language.
"""

import re
from functools import cache

from lingua import IsoCode639_1, Language, LanguageDetector, LanguageDetectorBuilder
from markdown_it import MarkdownIt

SPANISH_OR = ("es", "en", "pt", "fr", "it", "ca")
"""Languages to choose from for Spanish: those that a Llama changes to, and its neighbours. With all 75, the detector
often classifies short technical prose as another language."""
OTHERS = (*SPANISH_OR, "de", "nl", "sv", "pl", "cs", "ru", "tr", "ar", "zh", "ja", "id")
"""Languages to choose from for another language, which is added."""
NEIGHBOURS = {
    "da": ("nb",), "nb": ("da",), "nn": ("da",), "sv": ("da", "nb"), "cs": ("sk",), "hr": ("sl", "sk"), "sk": ("hr",),
    "ru": ("uk", "bg"), "uk": ("be", "bg", "sr"), "be": ("uk",), "bg": ("mk", "sr"), "sr": ("bg", "mk"),
    "hi": ("mr",), "mr": ("hi",), "fa": ("ur",), "ur": ("fa",),
}  # fmt: skip
"""More languages to choose from: those that the detector takes for the language, and can tell from it."""

MIN_WORDS = 6
"""Minimum words of prose for a verdict. An answer with fewer counts as in another language: code alone teaches
nothing."""
UNSPACED = ("zh", "ja", "th")
"""Languages without blanks between words."""
CHARACTERS_PER_WORD = 2
"""Characters of such a language that count as a word."""

_IDENTIFIER = re.compile(r"[0-9_$<>{}=/\\@|]|\w[(\[]|[a-záéíóúüñ][A-Z]|\w\.\w")
"""Part of a word that is code without backticks: camelCase, a.b, f(), T[], TS2322, a path or an address."""
_WORD = re.compile(r"[^\W\d_]{2,}")
_UNSPACED_RUN = re.compile(r"[\u0e00-\u0e7f\u3005-\u30ff\u3400-\u9fff]+")


def is_in_language(text: str, language: str) -> tuple[bool, float]:
    """Whether a Markdown text's prose is in a language, and the detector's confidence in that language, 0 to 1.

    Returns (False, 0.0) for fewer than MIN_WORDS words. A text that is half in another language is not in it.
    """
    words = prose(text, language)
    if count_words(words, language) < MIN_WORDS:
        return False, 0.0
    confidence = float(_detector(language).compute_language_confidence(words, _named(language)))
    return confidence > 0.5, round(confidence, 4)


@cache
def _detector(language: str) -> LanguageDetector:
    codes = SPANISH_OR if language == "es" else (*OTHERS, language, *NEIGHBOURS.get(language, ()))
    # Low accuracy mode uses trigrams only: 15 MB instead of 160, and equal verdicts for texts of a paragraph or more.
    return LanguageDetectorBuilder.from_languages(*map(_named, dict.fromkeys(codes))).with_low_accuracy_mode().build()


def _named(code: str) -> Language:
    return Language.from_iso_code_639_1(IsoCode639_1.from_str(code))


def count_words(words: str, language: str) -> int:
    """Return the number of words of some prose."""
    if language not in UNSPACED:
        return len(_WORD.findall(words))
    characters = sum(len(run) for run in _UNSPACED_RUN.findall(words))
    return len(_WORD.findall(_UNSPACED_RUN.sub(" ", words))) + characters // CHARACTERS_PER_WORD


def prose(text: str, language: str = "es") -> str:
    """The prose of a Markdown text, without code blocks, inline code, tags, addresses and identifiers."""
    parts = []
    # With HTML, the `<number>` of an unquoted Array<number> would be removed and `Array` left.
    for token in MarkdownIt("commonmark", {"html": False}).parse(text):
        parts += [child.content if child.type == "text" else " " for child in token.children or ()]
        parts.append("\n")
    found = "".join(parts)
    if language in UNSPACED:  # an identifier ends where a word of the language begins
        found = _UNSPACED_RUN.sub(r" \g<0> ", found)
    return " ".join(word for word in found.split() if not _IDENTIFIER.search(word))
