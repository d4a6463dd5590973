"""Find the declared names of given TypeScript code that a correction of it lacks.

In: the question's code blocks and the answer's. Out: the missing names. A correction may rename variables and change
parameters; it must keep functions, types, classes and methods. Pure. Does not compile anything.
"""

import re
from collections.abc import Sequence

from tutor.graders.typescript.scanner import tokens

_LASTING = ("function", "class", "interface", "type", "enum", "namespace")
"""Keywords before a name that a correction must keep."""
_VARIABLE = ("const", "let", "var")
"""Keywords before a name that a correction may change."""
_NAME = re.compile(r"[^\W\d][\w$]*|\$[\w$]*")
_BEFORE_METHOD = ("{", "}", ";", "public", "protected", "static", "async", "override", "abstract", "get", "set", "*")
"""Tokens that can stand before the name of a method's declaration."""
_NO_METHOD = ("if", "for", "while", "switch", "catch", "return", "function", "constructor", "await", "super", "new")
"""Words before a bracket that are not the name of a method."""


def dropped_names(given: Sequence[str], answered: Sequence[str]) -> list[str]:
    """Names that the given code blocks declare and the answer's blocks do not use, in the order of declaration.

    Functions, types, classes, enums and methods count. Variables count only when nothing else is declared, and one of
    them in the answer is then enough. A name inside a longer one counts as used (`Volumen`, `volumenActual`).
    """
    lasting: dict[str, None] = {}
    variables: dict[str, None] = {}
    for code in given:
        words = ["", *(token.text for token in tokens(code)), "", ""]
        for at in range(1, len(words) - 2):
            before, word, after = words[at - 1 : at + 2]
            if not _NAME.fullmatch(word):
                continue
            if before in _LASTING or (before in _BEFORE_METHOD and after == "(" and _declares(words, at + 1)):
                lasting[word] = None
            elif before in _VARIABLE and word != "enum":
                variables[word] = None
    used = " ".join(token.text for code in answered for token in tokens(code)).casefold()
    missing = [name for name in lasting or variables if name.casefold() not in used]
    return missing if lasting or len(missing) == len(variables) else []


def _declares(words: Sequence[str], bracket: int) -> bool:
    """Whether the bracket at this index belongs to a method's declaration: a body or a type follows it."""
    if words[bracket - 1] in _NO_METHOD:
        return False
    level = 0
    for at in range(bracket, len(words)):
        level += (words[at] == "(") - (words[at] == ")")
        if not level:
            return words[at + 1 : at + 2] in (["{"], [":"])
    return False
