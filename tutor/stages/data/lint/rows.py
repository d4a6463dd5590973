"""Index the rows of a file for the linter, and check each row on its own.

In: a file of rows. Out: hashes, lengths and a sample of all rows; findings that concern one row alone. Keeps some
hundred bytes of a row, however long its texts are. Does not compare rows (linter.py).
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

from tutor.formats.importing.names import Options
from tutor.formats.importing.reading import open_rows
from tutor.formats.markdown import fences_are_closed
from tutor.formats.rows.conversations import MESSAGES
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import Limits, check_file
from tutor.formats.rows.rows import ExampleRow, PromptRow, parse_row
from tutor.prompt.messages import questions_so_far
from tutor.recipe.values import MARKED_TOKEN, PLAIN_TOKEN
from tutor.stages.data.base_tokens import TokenFinder
from tutor.stages.data.lint.characters import doubtful_characters
from tutor.stages.data.lint.conversations import RowTurns
from tutor.stages.data.lint.near_duplicates import Questions
from tutor.stages.data.lint.placeholders import find_placeholder
from tutor.stages.data.normal_form import normalise

LISTED = 200
"""Maximum number of kept findings of a kind; all are counted."""
SAMPLE = 500
"""Maximum number of rows whose language and tokens are examined; a sample that depends on the number of rows alone."""


@dataclass(frozen=True)
class RowChecks:
    """Checks of a row that depend on the base.

    `length` returns why it is too long, or None; `control_tokens` the base's control tokens in it; `refusal` why the
    prompt format cannot write it.
    """

    length: Callable[[RowTurns], str | None]
    control_tokens: TokenFinder | None = None  # None without the base's tokenizer
    refusal: Callable[[RowTurns], str | None] = lambda _: None


@dataclass(frozen=True, slots=True)
class LintFinding:
    """A doubtful row; line 0 is the file as a whole."""

    kind: str
    file: str
    line: int
    message: str


@dataclass
class RowIndex:
    """Kept data of the rows, and findings; an array has one entry a row."""

    held_out: str = ""  # file whose rows are prompts
    files: list[str] = field(default_factory=list)
    file: "array[int]" = field(default_factory=lambda: array("H"))
    line: "array[int]" = field(default_factory=lambda: array("L"))
    asks: "array[int]" = field(default_factory=lambda: array("Q"))  # hash of all questions, normalised
    earlier: dict[int, tuple[int, ...]] = field(default_factory=dict)  # the same up to each earlier turn
    answers: "array[int]" = field(default_factory=lambda: array("Q"))  # hash of all answers; 0: none
    characters: "array[int]" = field(default_factory=lambda: array("L"))
    questions: Questions = field(default_factory=Questions)
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)  # category, topic
    unlabelled: list[int] = field(default_factory=list)  # rows without a category, at most LISTED
    sample: list[tuple[int, RowTurns]] = field(default_factory=list)
    chosen: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - a sample, not a secret
    findings: list[LintFinding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, file: str, line: int, message: str) -> None:
        """Count a finding, and keep it unless LISTED of its kind are kept."""
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.findings.append(LintFinding(kind, file, line, message))

    def add_row(self, kind: str, row: int, message: str) -> None:
        """Add a finding about a row, given by its number."""
        self.add(kind, self.files[self.file[row]], self.line[row], message)

    def where(self, row: int, beside: int) -> str:
        """Return a row's line, with its file if that is not the file of the row `beside`."""
        same_file = self.file[row] == self.file[beside]
        return f"line {self.line[row]}" if same_file else f"{self.files[self.file[row]]}:{self.line[row]}"

    def side(self, *, held_out: bool) -> list[int]:
        """Return the numbers of the rows that are prompts, or of all others."""
        number = self.files.index(self.held_out) if self.held_out else -1
        return [row for row, file in enumerate(self.file) if (file == number) == held_out]


def index_file(path: Path, index: RowIndex, limits: Limits, checks: RowChecks) -> dict[str, int]:
    """Add the rows of a file; return the numbers of its rows, unusable rows and blank lines.

    Raises RecipeError or DataError where the file as a whole cannot be read.
    """
    check_file(path, limits.max_total_bytes)
    name = str(path)
    index.files.append(name)
    tolerated, dropped = Counter[str](), Counter[str]()
    prompts: bool | None = name == index.held_out or None  # None: decided by the first row
    total = bad = 0
    for line, found in open_rows(path, limits, tolerated, Options(answered=False)):
        total += 1
        if prompts is None and isinstance(found, dict):
            prompts = "expect" in found
        try:
            parse = partial(parse_row, dropped=dropped, strict=False, turns_as_text=limits.turns_as_text)
            row: ExampleRow | PromptRow = parse(found, PromptRow) if prompts else parse(found, ExampleRow)
        except RowError as fault:
            bad += 1
            index.add("special-token" if _holds_special(found) else "schema", name, line, str(fault))
            continue
        given = RowTurns.of_row(row, named=MESSAGES in found)
        if why := checks.refusal(given):
            bad += 1
            index.add("schema", name, line, why)
            continue
        _add_row(index, line, row, given)
        _check_row(index, given, checks)
    if not total:
        index.add("schema", name, 0, "0 rows")
    for key, count in dropped.items():
        index.add("unknown-key", name, 0, f"{key} in {count} rows")
    return {"rows": total, "unusable": bad, "blank_lines": tolerated["blank"]}


def _holds_special(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    messages = found.get(MESSAGES)
    messages = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    texts = [found.get("instruction"), found.get("response"), *(each.get("content") for each in messages)]
    return any(isinstance(text, str) and MARKED_TOKEN.search(text) for text in texts)


def _add_row(index: RowIndex, line: int, row: ExampleRow | PromptRow, given: RowTurns) -> None:
    """Add what comparisons need of a row."""
    *earlier, question = map(normalise, questions_so_far(given.row))
    number = len(index.line)
    if earlier:
        index.earlier[number] = tuple(map(_hash, earlier))
    index.file.append(len(index.files) - 1)
    index.line.append(line)
    index.asks.append(_hash(question))
    answers = given.answers()
    index.answers.append(_hash(answers) if answers else 0)
    index.characters.append(sum(len(text) for _, text in given.texts()))
    index.questions.add(question)
    if index.files[-1] == index.held_out:
        return
    index.groups[row.category, row.topic] += 1
    if not row.category and len(index.unlabelled) < LISTED:
        index.unlabelled.append(number)
    # Reservoir sampling (algorithm R): every row has the same chance to be in the sample
    place = number if number < SAMPLE else index.chosen.randrange(number + 1)
    if place < SAMPLE:
        index.sample[place : place + 1] = [(number, given)]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _check_row(index: RowIndex, given: RowTurns, checks: RowChecks) -> None:
    """Add findings about the row that was added last."""
    number = len(index.line) - 1
    texts = given.texts()
    for name, text in texts:
        if found := PLAIN_TOKEN.search(text):
            index.add_row("special-token", number, f"{name} holds {found[0]}")
        if doubtful := doubtful_characters(text):
            index.add_row("characters", number, f"{name} {doubtful}")
        if placeholder := find_placeholder(text):
            index.add_row("placeholder", number, f"{name} holds {placeholder}")
        if not fences_are_closed(text):
            index.add_row("fence", number, f"a code fence in {name} does not close")
    if why := checks.length(given):
        index.add_row("length", number, why)
    if checks.control_tokens and (tokens := checks.control_tokens("\n".join(text for _, text in texts))):
        index.add_row("special-token", number, f"holds {', '.join(tokens)}, a control token of the base")
