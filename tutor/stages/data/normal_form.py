"""The normal form of a question: what two spellings of one question have in common.

In: a question. Out: words and operators with one blank between them. Case, accents, punctuation, emphasis and list
marks of prose are left out: people type them in different ways. Operators stay, also without backticks (`7+3` and `7-3`
are two questions), and between backticks case and punctuation stay (`Number` and `number` are two types). Does not
compare questions (splitting.py).
"""

import re
import unicodedata

_ACCENTS = re.compile("[\u0300-\u036f]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_EQUAL_SIGNS = {"−": "-", "–": "-", "×": "*", "÷": "/"}
"""Signs that word processors write for the operators of a keyboard."""
_BLANKS = re.compile("[\x00-\x20\"'()_\x7f]+")
"""Blanks, and the marks that are no operator wherever they stand."""
_SIGNS = re.compile(r"[!#-&*-/:-@\[-\^{-~]+")
"""ASCII signs without the marks of _BLANKS and the backtick."""
_MARKS = ".,:;!?"
"""Punctuation of prose: an operator only with another sign."""
_MARK_OPERATOR = re.compile(r"\?\?|\?\.|\?:|!!|!\.|\.\.\.")
"""Operators made of marks of prose alone; with a blank before it, or between two words."""
_LINE_MARK = re.compile(r"\n[ \t]*(?:[-+>]|\*{1,3}|#{1,6})(?!\S)")
"""Mark of a list, a quotation, a heading or emphasis, at the start of a line with a blank behind it."""
_NO_WORD = re.compile(r"[^0-9a-z\x80-\U0010ffff]+")
_TOKENS = re.compile(r"\w+|[^\w\s]+")
_NEIGHBOURS = 8
"""Number of characters on each side of a sign that decide what it is."""


def normalise(text: str) -> str:
    """Return the normal form of a text. Empty only for a blank text."""
    composed = unicodedata.normalize("NFKC", text)
    parts = composed.split("`")
    parts[::2] = [unicodedata.normalize("NFKD", part.casefold()) for part in parts[::2]]
    parts[1::2] = [unicodedata.normalize("NFKD", part) for part in parts[1::2]]
    parts[0] = "\n" + parts[0]
    parts[::2] = map(_prose, parts[::2])
    parts[1::2] = [" ".join(_TOKENS.findall(_ACCENTS.sub("", part))) for part in parts[1::2]]
    return " ".join(" ".join(parts).split()) or " ".join(composed.casefold().split())


def _prose(text: str) -> str:
    """Return prose without accents and punctuation, each operator between blanks."""
    plain = _BEYOND_ASCII.sub(_fold, text)
    return _SIGNS.sub(_sign, _BLANKS.sub(" ", _LINE_MARK.sub(" ", plain)))


def _fold(sign: re.Match[str]) -> str:
    """Replace an accent or an invisible character by nothing, punctuation and pictures by a blank."""
    if operator := _EQUAL_SIGNS.get(sign[0]):
        return operator
    category = unicodedata.category(sign[0])
    if category == "Cf" or _ACCENTS.match(sign[0]):
        return ""
    if category in ("Sm", "Sc"):
        return f" {sign[0]} "
    return " " if category[0] in "PSZC" else sign[0]


def _sign(signs: re.Match[str]) -> str:
    """Replace a run of signs by a blank, or by the operator in it between blanks."""
    before = signs.string[max(0, signs.start() - _NEIGHBOURS) : signs.start()]
    after = signs.string[signs.end() : signs.end() + _NEIGHBOURS]
    starts, ends = before[-1:].isspace() or not before, after[:1].isspace() or not after
    operator = signs[0].rstrip(_MARKS)
    if ends and not starts:
        operator = operator.lstrip(_MARKS)
    if not operator:
        found = _MARK_OPERATOR.match(signs[0])
        stays = found and (starts or not (ends or found[0] == "..."))
        return f" {found[0]} " if found and stays else " "
    if set(operator) == {"*"} and starts != ends:
        return " "  # emphasis
    if set(operator) == {"-"}:
        return _hyphens(operator, before, after)
    return f" {operator} "


def _hyphens(run: str, before: str, after: str) -> str:
    """Replace hyphens of prose by a blank; keep minus signs of numbers, and decrements."""
    if len(run) > 1:
        return " " if before[-1:].isalpha() and after[:1].isalpha() else f" {run} "
    if before.rstrip(f" -{_MARKS}")[-1:].isdigit() and after.lstrip(" -")[:1].isdigit():
        return " - "
    return " -" if not before[-1:].strip() and after[:1].isdigit() else " "


def plain_words(text: str) -> str:
    """Return the text without case, accents and punctuation; punctuation between backticks stays.

    For an order that small changes of a question do not change, not for equality.
    """
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold()).split("`")
    parts[::2] = [_NO_WORD.sub(" ", _BEYOND_ASCII.sub(_fold, part)) for part in parts[::2]]
    return " ".join(_ACCENTS.sub("", "  ".join(parts)).split())
