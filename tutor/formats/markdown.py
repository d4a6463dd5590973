"""The fenced blocks of a Markdown text, as CommonMark sees them. Pure; does not know whether their code is any good."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt

TYPESCRIPT = ("ts", "typescript", "mts", "cts")
"""What a fence calls TypeScript. Not tsx: without a library's types no JSX compiles."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, or any code. `before`: whole lines of code that it needs, put in front of it."""

    code: str
    language: str = "ts"
    line: int = 1  # of its first line in the text that it comes from
    closed: bool = True  # the fence has its closing line
    before: str = ""
    quoted: bool = False  # from a question: what hushes the compiler is judged as the compiler judges it


def fenced(text: str) -> list[Block]:
    """The blocks of a text in order, whatever their language; "" where a fence names none."""
    if "```" not in text and "~~~" not in text:
        return []
    blocks = []
    for token in _markdown().parse(text):
        if token.type == "fence":
            first, end = token.map or (0, 0)
            lines = token.content.removesuffix("\n").count("\n") + 1 if token.content else 0
            language = (token.info.split() or [""])[0].lower()
            # An unclosed fence ends with the text: no line is left for the closing one
            blocks.append(Block(token.content, language, first + 2, closed=end - first == lines + 2))
    return blocks


def typescript(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that are TypeScript: those that say so; where none does, those that say nothing."""
    named = [block for block in blocks if block.language in TYPESCRIPT]
    return named or [block for block in blocks if not block.language]


@cache
def _markdown() -> MarkdownIt:
    """CommonMark without its inline rules: fences are blocks."""
    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser
