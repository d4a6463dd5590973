"""What the linter keeps of a row. In: a file. Out: hashes, lengths and a sample, and what is doubtful in a row alone.

Helper of lint.py. A row costs some hundred bytes, however long its texts are.
"""

import random
import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from tutor.formats.markdown import fences_are_closed
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import Limits, check_file, read_values
from tutor.formats.rows.rows import SPECIAL, ExampleRow, PromptRow, parse_row
from tutor.stages.data.lint.near_duplicates import Questions
from tutor.stages.data.splitting import normalise

LISTED = 200
"""Findings of a kind that are kept; all are counted."""
SAMPLE = 500
"""Rows whose language and tokens are looked at; of a larger set, a sample that depends on nothing but its size."""

_SPECIAL_TEXT = re.compile(
    r"<(?:/s|(?<!\w<)s|unk|pad|mask|bos|eos|start_of_turn|end_of_turn|</?SYS>)>"
    r"|\[(?:/?INST|BOS|EOS|PAD|CLS|SEP|MASK)\]"
)
"""Special tokens of families that rows.SPECIAL does not refuse; HTML and code may have the same texts."""

TooLong = Callable[[str, str], str | None]
"""Of a question and its answer: why they are too long, None where they are not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is doubtful, and where; line 0 is the file as a whole."""

    kind: str
    file: str
    line: int
    message: str


@dataclass
class Seen:
    """What is kept of the rows; an array has one entry a row."""

    held_out: str = ""  # the file whose rows are prompts
    files: list[str] = field(default_factory=list)
    file: "array[int]" = field(default_factory=lambda: array("H"))
    line: "array[int]" = field(default_factory=lambda: array("L"))
    asks: "array[int]" = field(default_factory=lambda: array("Q"))  # the question, normalised
    answers: "array[int]" = field(default_factory=lambda: array("Q"))  # 0: none
    characters: "array[int]" = field(default_factory=lambda: array("L"))
    questions: Questions = field(default_factory=Questions)
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)  # category, topic
    unlabelled: list[int] = field(default_factory=list)  # rows without a category, as many as are listed
    sample: list[tuple[int, str, str]] = field(default_factory=list)  # row, question, answer
    chosen: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - a sample, not a secret
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, file: str, line: int, message: str) -> None:
        """Count a finding, and keep it unless there are many of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.findings.append(Finding(kind, file, line, message))

    def note_row(self, kind: str, row: int, message: str) -> None:
        """The same for a row by its number."""
        self.note(kind, self.files[self.file[row]], self.line[row], message)

    def place(self, row: int, beside: int) -> str:
        """A row's line as it is named in a finding about the row `beside` it."""
        same_file = self.file[row] == self.file[beside]
        return f"line {self.line[row]}" if same_file else f"{self.files[self.file[row]]}:{self.line[row]}"

    def side(self, *, held_out: bool) -> list[int]:
        """The numbers of the rows that are prompts, or of those that are not."""
        number = self.files.index(self.held_out) if self.held_out else -1
        return [row for row, file in enumerate(self.file) if (file == number) == held_out]


def take_file(path: Path, seen: Seen, limits: Limits, too_long: TooLong) -> dict[str, int]:
    """Take in one file; how many rows it has, and how many are not usable.

    Raises RecipeError or DataError where the file as a whole cannot be read.
    """
    check_file(path, limits.max_total_bytes)
    name = str(path)
    seen.files.append(name)
    tolerated, dropped = Counter[str](), Counter[str]()
    prompts: bool | None = name == seen.held_out or None  # None: the first row says it
    total = bad = 0
    for line, found in read_values(path, limits, tolerated):
        total += 1
        if prompts is None and isinstance(found, dict):
            prompts = "expect" in found
        try:
            row: ExampleRow | PromptRow = (
                parse_row(found, PromptRow, dropped, strict=False)
                if prompts
                else parse_row(found, ExampleRow, dropped, strict=False)
            )
        except RowError as fault:
            bad += 1
            seen.note("special-token" if _holds_special(found) else "schema", name, line, str(fault))
            continue
        _keep(seen, line, row)
        _look(seen, row, too_long)
    if not total:
        seen.note("schema", name, 0, "0 rows")
    for key, count in dropped.items():
        seen.note("unknown-key", name, 0, f"{key} in {count} rows")
    return {"rows": total, "unusable": bad, "blank_lines": tolerated["blank"]}


def _holds_special(found: object) -> bool:
    texts = [found.get(name) for name in ("instruction", "response")] if isinstance(found, dict) else []
    return any(isinstance(text, str) and SPECIAL.search(text) for text in texts)


def _keep(seen: Seen, line: int, row: ExampleRow | PromptRow) -> None:
    """Keep what later comparisons need of a row."""
    question = normalise(row.instruction)
    number = len(seen.line)
    seen.file.append(len(seen.files) - 1)
    seen.line.append(line)
    seen.asks.append(_hash(question))
    seen.answers.append(_hash(row.response) if row.response else 0)
    seen.characters.append(len(row.instruction) + len(row.response))
    seen.questions.add(question)
    if seen.files[-1] == seen.held_out:
        return
    seen.groups[row.category, row.topic] += 1
    if not row.category and len(seen.unlabelled) < LISTED:
        seen.unlabelled.append(number)
    # Every row has the same chance to be in the sample (algorithm R)
    place = number if number < SAMPLE else seen.chosen.randrange(number + 1)
    if place < SAMPLE:
        seen.sample[place : place + 1] = [(number, row.instruction, row.response)]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _look(seen: Seen, row: ExampleRow | PromptRow, too_long: TooLong) -> None:
    """Find what is doubtful in the row that was kept last."""
    number = len(seen.line) - 1
    for name, text in (("instruction", row.instruction), ("response", row.response)):
        if found := _SPECIAL_TEXT.search(text):
            seen.note_row("special-token", number, f"{name} holds {found[0]}")
        if not fences_are_closed(text):
            seen.note_row("fence", number, f"a code fence in {name} does not close")
    if why := too_long(row.instruction, row.response):
        seen.note_row("length", number, why)
