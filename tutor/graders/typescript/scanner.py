"""What a TypeScript text says about itself before it is compiled. Pure: a small scanner, not a parser.

In: a block's text. Out: how it would hush the compiler up, how deep it nests, whether it changes what others mean.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_SUPPRESSION = re.compile(r"@ts-(?:nocheck|ignore|expect-error)\b", re.IGNORECASE)
_DIRECTIVE = re.compile(r"(?<!/)/{3,}+[^\S\n]{0,100}+<")
"""`/// <reference ...>`; every repetition here is bounded or possessive: hostile text must not make it quadratic."""

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
"""The text of a template up to its end or to the next expression in it."""

_BEFORE_REGEX = {"return", "typeof", "case", "in", "of", "void", "delete", "do", "else", "await", "yield", "throw"}
"""After any other word, after `)`, `]` or `}`, a slash divides."""
_NAMED = {"const", "let", "var", "function", "class", "interface", "type", "enum", "namespace", "import", "get", "set"}
"""What declares the word behind it: `any` is then a name, if an unwise one."""
_BEFORE_KEY = {"", "{", "}", ",", ";", "(", "...", "readonly", "public", "private", "protected", "static"}


class Token(NamedTuple):
    """A word or a mark, and its line."""

    text: str
    line: int


def tokens(code: str) -> Iterator[Token]:
    """The words and marks of a text, without strings, comments, regular expressions and the text of templates."""
    at, line, before = 0, 1, ""
    open_braces: list[int] = []  # for each template around this place, how many braces are open in its expression
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
            assert rest is not None  # it matches nothing, too
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
    """`suppressions`: (line, text) of all that takes the compiler's word away: its comments, `any`, ambient modules.

    `depth`: how deep brackets lie in each other. `reaches_out`: the text can change what others of the same
    compilation mean, by global declarations or directives. `empty`: there is nothing in it but comments and strings.
    """

    suppressions: tuple[tuple[int, str], ...]
    depth: int
    reaches_out: bool
    empty: bool


def scan(code: str) -> Scan:
    """Look through a text once; time grows with its length, whatever is in it."""
    found = [
        (code.count("\n", 0, match.start()) + 1, match[0].lower())
        for match in _SUPPRESSION.finditer(code)
        if _opens_comment(code[code.rfind("\n", 0, match.start()) + 1 : match.start()])
    ]
    words = [Token("", 0), *tokens(code), Token("", 0), Token("", 0)]
    deepest = level = 0
    reaches_out = bool(_DIRECTIVE.search(code))
    for place, (text, line) in enumerate(words):
        level += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
        deepest = max(deepest, level)
        if text == "any" and _is_type(words, place):
            found.append((line, "any"))
        elif text == "declare" and (kind := words[place + 1].text) in ("module", "namespace", "global"):
            reaches_out = True
            found += [(line, f"declare {kind}")] if kind != "global" else []
    return Scan(tuple(sorted(set(found))), deepest, reaches_out, empty=len(words) == 3)


def _opens_comment(before: str) -> bool:
    """Whether what stands before it in its line is the beginning of a comment, or nothing (a comment's later line).

    The compiler is stricter: some of these it does not obey. Who writes one means it.
    """
    rest = before.rstrip("*/ \t\v\f\r\u00a0\ufeff")
    signs = before[len(rest) :]
    return not rest or "//" in signs or "/*" in signs


def _is_type(words: list[Token], place: int) -> bool:
    """Whether the `any` there is a type: not a member, a key, a method or a name that is being declared."""
    before, after, then = words[place - 1].text, words[place + 1].text, words[place + 2].text
    if before in (".", "?.") and words[place - 2].text != ".":
        return False
    if after == "(" or before in _NAMED:
        return False
    key = after == ":" or (after == "?" and then == ":")
    return not (
        key and before in ("{", ",", ";", "(", "}", "...", "", "readonly", "public", "private", "protected", "static")
    )
