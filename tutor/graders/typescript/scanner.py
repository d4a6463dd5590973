"""Scan TypeScript text before it is compiled. Pure: a small scanner, not a parser.

In: a block's text. Out: what in it suppresses the compiler, the depth of its brackets, whether it has global effects.
Does not check the syntax.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_SUPPRESSION = re.compile(r"@ts-(?:nocheck|ignore|expect-error)\b", re.IGNORECASE)
_DIRECTIVE = re.compile(r"(?<!/)/{3,}+[^\S\n]{0,100}+<")
"""`/// <reference ...>`. Repetitions are bounded or possessive, so that hostile text does not make it quadratic."""

_TOKEN = re.compile(
    r"""(?P<comment>//[^\n\r\u2028\u2029]*|/\*.*?(?:\*/|\Z))
    |(?P<string>"(?:[^"\\\n\r]|\\.)*"?|'(?:[^'\\\n\r]|\\.)*'?)
    |(?P<template>`)
    |(?P<regex>/(?![/*])(?:[^/\\\[\n\r]|\\[^\n\r]|\[(?:[^\]\\\n\r]|\\[^\n\r]){0,256}+\]){1,512}+/[a-z]*)
    |(?P<word>[\w$\u200c\u200d]+)
    |(?P<mark>\?\.|=>|\.\.\.|[^\s])
    """,
    re.VERBOSE | re.DOTALL,
)
_TEMPLATE = re.compile(r"(?:[^`\\$]|\\.|\\\Z|\$(?!\{))*(`|\$\{|\Z)", re.DOTALL)
"""Text of a template up to its end or to its next expression."""

_BEFORE_REGEX = {"return", "typeof", "case", "in", "of", "void", "delete", "do", "else", "await", "yield", "throw"}
"""Words before a slash that starts a regular expression; after any other word, `)`, `]` or `}` a slash divides."""
_NAMED = {"const", "let", "var", "function", "class", "interface", "type", "enum", "namespace", "import", "get", "set"}
"""Words before a name that is declared: `any` after one of them is a name, not a type."""
_BEFORE_KEY = {"", "{", "}", ",", ";", "(", "...", "readonly", "public", "private", "protected", "static"}
"""Tokens before a key or a parameter: `any` between one of them and a colon is a name, not a type."""


class Token(NamedTuple):
    """A word or a punctuation mark, and its line."""

    text: str
    line: int


def tokens(code: str) -> Iterator[Token]:
    """The words and marks of a text, without strings, comments, regular expressions and texts of templates."""
    at, line, before = 0, 1, ""
    open_braces: list[int] = []  # number of open braces in the expression of each enclosing template
    while match := _next(code, at, before):
        line += code.count("\n", at, match.start())
        at, kind, text = match.end(), match.lastgroup, match.group()
        start = line
        line += text.count("\n")
        if kind in ("word", "mark"):
            if open_braces and text == "{":
                open_braces[-1] += 1
            elif open_braces and text == "}":
                open_braces[-1] -= 1
            yield Token(text, start)
        if kind == "template" or (open_braces and open_braces[-1] < 0):
            if kind != "template":
                open_braces.pop()
            rest = _TEMPLATE.match(code, at)
            assert rest is not None  # the pattern matches the empty text, too
            line += code.count("\n", at, rest.end())
            at = rest.end()
            if rest.group(1) == "${":
                yield Token("{", line)
                open_braces.append(0)
            text = "`"
        if kind != "comment":
            before = text


def _next(code: str, at: int, before: str) -> re.Match[str] | None:
    match = _TOKEN.search(code, at)
    if match and match.lastgroup == "regex":
        word = before[-1:].isalnum() or before[-1:] in ("_", "$")
        divides = before not in _BEFORE_REGEX if word else before in (")", "]", "}", "`") or before[:1] in ("'", '"')
        if divides:
            return re.compile(r"(?P<mark>/)").match(code, match.start())
    return match


@dataclass(frozen=True)
class Scan:
    """Findings in a text.

    `suppressions`: (line, text) of what keeps the compiler from checking: @ts comments, `any`, ambient modules.
    `depth`: maximum depth of nested brackets. `is_global`: global declarations or directives in the text can change
    other blocks of the same compilation. `empty`: it has only comments and strings.
    """

    suppressions: tuple[tuple[int, str], ...]
    depth: int
    is_global: bool
    empty: bool


def scan(code: str) -> Scan:
    """Scan a text once, in time linear in its length."""
    found = [
        (code.count("\n", 0, match.start()) + 1, match[0].lower())
        for match in _SUPPRESSION.finditer(code)
        if _opens_comment(code[code.rfind("\n", 0, match.start()) + 1 : match.start()])
    ]
    words = [Token("", 0), *tokens(code), Token("", 0), Token("", 0)]
    depth = level = 0
    is_global = bool(_DIRECTIVE.search(code))
    for index, (text, line) in enumerate(words):
        level += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
        depth = max(depth, level)
        if text == "any" and _is_type(words, index):
            found.append((line, "any"))
        elif text == "declare" and (kind := words[index + 1].text) in ("module", "namespace", "global"):
            is_global = True
            found += [(line, f"declare {kind}")] if kind != "global" else []
    return Scan(tuple(sorted(set(found))), depth, is_global, empty=len(words) == 3)


def _opens_comment(before: str) -> bool:
    """Whether the text before it in its line opens a comment, or is blank (a later line of a comment).

    The compiler is stricter and ignores some of these; the intention counts.
    """
    rest = before.rstrip("*/ \t\v\f\r\u00a0\ufeff")
    marks = before[len(rest) :]
    return not rest or "//" in marks or "/*" in marks


def _is_type(words: list[Token], index: int) -> bool:
    """Whether the `any` at an index is a type: not a member, a key, a method or a declared name."""
    before, after, then = words[index - 1].text, words[index + 1].text, words[index + 2].text
    if before in (".", "?.") and words[index - 2].text != ".":
        return False
    if after == "(" or before in _NAMED:
        return False
    key = after == ":" or (after == "?" and then == ":")
    return not (key and before in _BEFORE_KEY)
