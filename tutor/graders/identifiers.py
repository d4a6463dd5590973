"""Does corrected code still do the job: which names of the given code are gone. Pure; says nothing about compiling.

In: the question's TypeScript and the answer's. Out: the names that the answer dropped. A correction may rename a
variable and may add or change parameters; the functions, types, classes and methods that it was given stay.
"""

import re
from collections.abc import Sequence

from tutor.graders.typescript.scanner import tokens

_LASTING = ("function", "class", "interface", "type", "enum", "namespace")
_PASSING = ("const", "let", "var")
_NAME = re.compile(r"[^\W\d][\w$]*|\$[\w$]*")
_BEFORE_METHOD = ("{", "}", ";", "public", "protected", "static", "async", "override", "abstract", "get", "set", "*")
_NO_METHOD = ("if", "for", "while", "switch", "catch", "return", "function", "constructor", "await", "super", "new")


def dropped(given: Sequence[str], answered: Sequence[str]) -> list[str]:
    """The names that the given blocks of code declare and the answer's nowhere use, in order.

    Functions, types, classes, enums and the methods of classes and interfaces count each; variables only where there
    is nothing else, and then one of them is enough. A name inside a longer one is kept (`Volumen`, `volumenActual`).
    """
    lasting: dict[str, None] = {}
    passing: dict[str, None] = {}
    for code in given:
        words = ["", *(token.text for token in tokens(code)), "", ""]
        for place in range(1, len(words) - 2):
            before, word, after = words[place - 1 : place + 2]
            if not _NAME.fullmatch(word):
                continue
            if before in _LASTING or (before in _BEFORE_METHOD and after == "(" and _declares(words, place + 1)):
                lasting[word] = None
            elif before in _PASSING and word != "enum":
                passing[word] = None
    used = " ".join(token.text for code in answered for token in tokens(code)).casefold()
    gone = [name for name in lasting or passing if name.casefold() not in used]
    return gone if lasting or len(gone) == len(passing) else []


def _declares(words: Sequence[str], bracket: int) -> bool:
    """Whether the bracket that opens there belongs to a method's declaration: a body or a type comes behind it."""
    if words[bracket - 1] in _NO_METHOD:
        return False
    level = 0
    for place in range(bracket, len(words)):
        level += (words[place] == "(") - (words[place] == ")")
        if not level:
            return words[place + 1 : place + 2] in (["{"], [":"])
    return False
