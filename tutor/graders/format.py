"""Check the form of an answer: complete, closed code fences, no loop, no text of the prompt template.

In: an answer's text and finish reason. Out: a verdict per property, true when the property is good. Pure. Does not
check whether the answer is right.
"""

import re
from typing import TypedDict

from tutor.formats.markdown import fenced_blocks
from tutor.prompt.tutor_format import CUE, QUESTION

LOOP_REPEATS = 3
"""Minimum number of consecutive repetitions in a loop. No answer of data/tutor.jsonl has three."""
LOOP_WORDS = 18
"""Minimum length of a loop in words. Shorter repetitions are normal in prose and code (a table of zeros)."""
LOOP_PERIOD = 120
"""Maximum length of the repeated unit in words; three units are more than 515 tokens."""

_STUCK = re.compile(r"(\S{1,8}?)\1{29,}")
"""One to eight characters other than blanks, thirty times or more: `!!!!`."""
_RULE = re.compile(r"[=*_|:+~#.─═—-]+")
"""Drawn lines, table rules and rows of dots, which are no loop."""
_NUMBERED = re.compile(r"^\s*(?:\d+|[A-Za-z])[.)]\s", re.MULTILINE)
"""Number or letter of a list item."""

_LABELS = re.compile(rf"^\s*(?:{re.escape(QUESTION.strip())}|{re.escape(CUE.strip())})", re.MULTILINE)
"""Labels of the tutor's prompt format at the start of a line."""
_TOKENS = re.compile(r"</?think>|<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|(?<!\w)<s>|<unk>|\[/?INST\]|<(?:start|end)_of_turn>")
"""Thinking tags and special tokens as text; engines remove those that belong to the format."""


class FormatVerdict(TypedDict):
    """Verdicts on the form of an answer, true when good, and its length."""

    stopped: bool  # by EOS or a stop text, not cut at max_new_tokens
    ended: bool  # by EOS
    answered: bool  # more than blanks
    fences_closed: bool  # every Markdown code fence has its closing line
    code_block: bool  # at least one fenced block with content
    no_loop: bool  # LOOP_REPEATS, LOOP_WORDS
    no_leak: bool  # no text of the prompt template, thinking tag or special token
    characters: int  # length of the text without blanks around it


def grade_format(text: str, finish: str, kind: str = "tutor") -> FormatVerdict:
    """Grade the form of an answer, from its text without a thought and its finish reason ("eos", "stop" or "length").

    `kind` of the prompt format: with the base's own template ("base"), the labels of the tutor's are normal words.
    """
    blocks = fenced_blocks(text)
    return FormatVerdict(
        stopped=finish != "length",
        ended=finish == "eos",
        answered=bool(text.strip()),
        fences_closed=all(block.closed for block in blocks),
        code_block=any(block.code.strip() for block in blocks),
        no_loop=not loops(text),
        no_leak=_TOKENS.search(text) is None and not (kind == "tutor" and _LABELS.search(text)),
        characters=len(text.strip()),
    )


def loops(text: str) -> bool:
    """Whether a text has LOOP_REPEATS consecutive repetitions over LOOP_WORDS words, or one short string many times."""
    if any(not _RULE.fullmatch(found.group()) for found in _STUCK.finditer(text)):
        return True
    # The numbers of a list differ in every repetition. Braces and dashes are no words.
    words = [word for word in _NUMBERED.sub(" ", text).split() if re.search(r"\w", word)]
    return any(_repeats(words, period) for period in range(1, min(LOOP_PERIOD, len(words) // LOOP_REPEATS) + 1))


def _repeats(words: list[str], period: int) -> bool:
    """Whether enough consecutive words equal the words `period` before them."""
    needed = max(LOOP_REPEATS * period, LOOP_WORDS) - period
    run = 0
    for before, word in zip(words, words[period:], strict=False):
        run = run + 1 if before == word else 0
        if run >= needed:
            return True
    return False
