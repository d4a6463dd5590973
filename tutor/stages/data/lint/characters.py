"""Characters of a text that are not the ones its author saw: read in another encoding, invisible, or in two parts.

In: a text. Out: the first such place as a message, or None. The rows are usable, so that it is a finding, not an error.
"""

import re
import unicodedata

from tutor.formats.rows.json_values import printable

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_PAIRS = re.compile("[ÂÃ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|[\xe0-\xf4][^\x00-\x7f]{2,3}")
"""Texts that may be one character of UTF-8 read as Windows-1252: of two bytes only the letters of Western Europe."""
_ZERO_WIDTH_JOINER = "\u200d"
_UNSEEN = {"Cf": "invisible", "Co": "of private use", "Cn": "not assigned"}
"""Categories of characters that no font shows, in words."""


def doubtful_characters(text: str) -> str | None:
    """Return what is wrong with the characters of a text, at its first place; None where they are as meant."""
    if not _BEYOND_ASCII.search(text):
        return None
    if "\ufffd" in text:
        return "holds U+FFFD, the mark of a character that could not be read"
    for found in _PAIRS.finditer(text):
        if meant := _meant(found[0]):
            return f"holds '{printable(found[0])}', which is '{printable(meant)}' read as Windows-1252"
    for place, sign in enumerate(text):
        if sign > "\x7f" and (kind := _UNSEEN.get(unicodedata.category(sign))) and not _joins(text, place):
            return f"holds U+{ord(sign):04X}, which is {kind}"
    if not unicodedata.is_normalized("NFC", text):
        return "has accents as characters of their own (NFD), which other tokens stand for: convert it to NFC"
    return None


def _meant(garbled: str) -> str:
    """The characters whose UTF-8 was read as Windows-1252; "" where the text is no such misreading."""
    for length in range(len(garbled), 1, -1):  # a fourth character may be of the next word
        try:
            return b"".join(map(_byte, garbled[:length])).decode()
        except UnicodeError:
            continue
    return ""


def _byte(sign: str) -> bytes:
    """The byte of a character in Windows-1252, or in Latin-1 where Windows-1252 has none."""
    try:
        return sign.encode("cp1252")
    except UnicodeEncodeError:
        return sign.encode("latin-1")


def _joins(text: str, place: int) -> bool:
    """Whether the character joins two pictures to one."""
    around = (text[place - 1 : place], text[place + 1 : place + 2])
    return text[place] == _ZERO_WIDTH_JOINER and all(unicodedata.category(sign or " ")[0] in "SM" for sign in around)
