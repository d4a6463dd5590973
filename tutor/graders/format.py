"""Is an answer well-formed: ended by itself, Markdown whole, no turning in circles, nothing of the contract shown.

In: an answer's text and finish reason. Out: one verdict a property, true where it is as it should be. Pure; says
nothing about whether the answer is right.
"""

import re
from typing import TypedDict

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tutor.prompt import CUE, QUESTION

LOOP_REPEATS = 3
LOOP_WORDS = 18
"""A loop: the same words at least three times back to back, over 18 words or more.

Prose and code repeat short runs for good reasons (parallel cases, a table of zeros), but no answer of data/tutor.jsonl
says anything three times running; a model that is stuck passes both numbers well within its 515 tokens.
"""
LOOP_PERIOD = 120
"""Longest repeated unit that is looked for, in words: three of it are more than 515 tokens."""

_STUCK = re.compile(r"(\S{1,8}?)\1{29,}")
"""One to eight signs without a blank, thirty times: `!!!!`."""
_RULE = re.compile(r"[=*_|:+~#.─═—-]+")
"""Lines drawn with signs, table rules and rows of dots are no loop."""
_NUMBERED = re.compile(r"^\s*(?:\d+|[A-Za-z])[.)]\s", re.MULTILINE)

_LEAKS = re.compile(
    rf"^\s*(?:{re.escape(QUESTION.strip())}|{re.escape(CUE.strip())})"
    r"|</?think>|<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|(?<!\w)<s>|<unk>|\[/?INST\]",
    re.MULTILINE,
)
"""The contract's labels at a line's start, thinking tags, and the special tokens of the Llama kin as text."""


class FormatVerdict(TypedDict):
    """True where the answer is as it should be."""

    stopped: bool  # by EOS or a stop text, not cut at max_new_tokens
    answered: bool  # more than blanks
    fences_closed: bool  # every Markdown code fence that opens also closes
    code_block: bool  # at least one fenced block with content
    no_loop: bool  # LOOP_REPEATS, LOOP_WORDS
    no_leak: bool  # no template text, thinking tag or special token
    characters: int  # of the text as shown


def judge_format(text: str, finish: str) -> FormatVerdict:
    """The verdicts on an answer's text and its finish reason ("stop" or "length")."""
    fences = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    return FormatVerdict(
        stopped=finish == "stop",
        answered=bool(text.strip()),
        fences_closed=all(_is_closed(fence) for fence in fences),
        code_block=any(fence.content.strip() for fence in fences),
        no_loop=not loops(text),
        no_leak=_LEAKS.search(text) is None,
        characters=len(text.strip()),
    )


def _is_closed(fence: Token) -> bool:
    """Whether a fence has its closing line: it spans its content and two lines more, else the text ended inside it."""
    first, end = fence.map or (0, 0)
    content = fence.content.removesuffix("\n")
    lines = content.count("\n") + 1 if fence.content else 0
    return end - first == lines + 2


def loops(text: str) -> bool:
    """Whether a text repeats itself back to back: LOOP_REPEATS times over LOOP_WORDS words, or one sign for ever."""
    if any(not _RULE.fullmatch(stuck.group()) for stuck in _STUCK.finditer(text)):
        return True
    # A stuck list still counts on: its numbers are not part of what repeats. Braces and dashes are no words.
    words = [word for word in _NUMBERED.sub(" ", text).split() if re.search(r"\w", word)]
    return any(_repeats(words, period) for period in range(1, min(LOOP_PERIOD, len(words) // LOOP_REPEATS) + 1))


def _repeats(words: list[str], period: int) -> bool:
    """Whether some run of words equals itself moved by `period` for long enough."""
    needed = max(LOOP_REPEATS * period, LOOP_WORDS) - period
    run = 0
    for before, word in zip(words, words[period:], strict=False):
        run = run + 1 if before == word else 0
        if run >= needed:
            return True
    return False
