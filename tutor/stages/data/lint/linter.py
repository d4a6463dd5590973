"""The linter for question and answer pairs: repeats, contradictions, leaks, lengths, language, balance.

In: files of rows, and the held-out prompts. Out: findings, each with its line, and figures. Reads each file once and
keeps some hundred bytes a row, and the texts of a sample. Changes no file and raises no error for a finding.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutor.errors import RecipeError
from tutor.formats.rows.json_values import printable
from tutor.formats.rows.jsonl import Limits
from tutor.graders.language import MIN_WORDS, UNSPACED, count_words, is_in_language, prose
from tutor.recipe.values import ANY_LANGUAGE, LANGUAGES
from tutor.stages.data import base_tokens
from tutor.stages.data.base_tokens import BaseTokens, TokenCounter
from tutor.stages.data.lint import figures
from tutor.stages.data.lint.near_duplicates import groups_by_key, near_pairs, nearest
from tutor.stages.data.lint.rows import LintFinding, RowChecks, RowIndex, index_file

KINDS = {
    "schema": "rows that the data stage or the base's chat template refuses",
    "unknown-key": "keys that are dropped",
    "special-token": "texts that the base, or a tokenizer or template of another, reads as a token of its own",
    "characters": "characters read in another encoding, invisible ones, and accents apart from their letters",
    "placeholder": "placeholders that nobody filled in, such as {{name}} or <your name>",
    "fence": "code fences that do not close",
    "length": "rows longer than train.max_length: they would be cut, or refused",
    "duplicate": "rows that repeat another one",
    "near-duplicate": "questions nearly like another one",
    "same-answer": "answers that are given to several questions",
    "contradiction": "questions that are answered in two ways",
    "leak": "questions that are also held-out prompts",
    "near-leak": "questions nearly like a held-out prompt",
    "language": "rows that are not in the recipe's language, where most are",
    "balance": "categories and topics with few rows, and rows without",
}
"""Description by kind of finding, in the order of the report."""
NEAR = 0.6
"""Minimum similarity of two questions that are reported as near duplicates.

Two questions of six words that differ in one have 0.57, and mostly another subject.
"""
FIGURE_NEAR = 0.2
"""Minimum similarity of the pairs of row and prompt in the figures."""
FIGURE_PAIRS = 500_000
"""Maximum number of pairs of row and prompt for figures down to FIGURE_NEAR; above, down to NEAR."""
MAJORITY = 0.8
"""Minimum share of rows in the recipe's language; with fewer, no row is reported for its language."""
MAX_CHARACTERS = 20_000
"""Maximum number of characters of a question with its answer that decide their language."""
SPARSE = 0.25
"""Minimum rows of a category or topic, as a part of an equal share; one with fewer is reported."""


@dataclass(frozen=True)
class LintReport:
    """Findings (at most LISTED of a kind), their counts, and figures as JSON values."""

    files: dict[str, dict[str, int]]
    findings: tuple[LintFinding, ...]
    counts: dict[str, int]
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "findings": [asdict(each) for each in self.findings]}


def lint(
    files: Sequence[Path],
    against: Path | None = None,
    *,
    max_length: int,
    language: str = "es",
    base: BaseTokens | None = None,
    limits: Limits | None = None,
) -> LintReport:
    """Lint the rows in `files`, and compare them with the held-out prompts in `against`.

    `max_length` is in tokens of a whole conversation, the system text included; without `base` lengths are in
    characters. `language` is an ISO 639-1 code, or ANY_LANGUAGE.
    Raises RecipeError or DataError where a file as a whole cannot be read, ArtifactError for a damaged tokenizer.
    """
    if against and any(_is_same(against, path) for path in files):
        raise RecipeError(f"{against} is both looked through and held out", "name another file for one of them")
    index = RowIndex()
    sizes = {}
    row_checks, counter = _row_checks(max_length, base)
    for path in [*files, *([against] if against else [])]:
        if path is against:
            index.held_out = str(path)
        sizes[str(path)] = index_file(path, index, limits or Limits(), row_checks)
    train, prompts = index.side(held_out=False), index.side(held_out=True)
    for rows in (train, prompts):
        _repeats(index, rows)
    leaks = _leaks(index, train, prompts)
    languages = None if language == ANY_LANGUAGE else _languages(index, language)
    lengths = _lengths(index, train, max_length, counter)
    _balance(index)
    order = {name: number for number, name in enumerate(KINDS)}
    return LintReport(
        files=sizes,
        findings=tuple(sorted(index.findings, key=lambda each: (order[each.kind], each.file, each.line))),
        counts={kind: index.counts[kind] for kind in KINDS if index.counts[kind]},
        figures={
            "rows": len(train),
            "groups": figures.cross_table(index.groups),
            "lengths": lengths,
            "language": languages,
            "nearest": leaks,
        },
    )


def _row_checks(max_length: int, base: BaseTokens | None) -> tuple[RowChecks, TokenCounter | None]:
    """The checks that depend on the base, and the counter of tokens where its tokenizer is known."""
    if base is None:
        return RowChecks(figures.length_check(max_length, None)), None
    tokenizer = base_tokens.read_tokenizer(base.file)
    counter = base_tokens.token_counter(tokenizer, base)
    finder = base_tokens.control_token_finder(tokenizer)
    checks = RowChecks(
        figures.length_check(max_length, counter), finder, lambda given: base_tokens.refusal(base, given.row)
    )
    return checks, counter


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names, perhaps links, are of one file; a name without a file is reported where it is read."""
    with contextlib.suppress(OSError, ValueError):
        return path.samefile(other)
    return path == other


def _repeats(index: RowIndex, rows: Sequence[int]) -> None:
    """Find rows of one side that repeat or contradict another one."""
    for group in groups_by_key(index.asks, rows):
        first: dict[int, int] = {}
        for row in group:
            earlier = first.setdefault(index.answers[row], row)
            if earlier != row:
                index.add_row("duplicate", row, f"repeats {index.where(earlier, row)}")
            elif len(first) > 1:
                index.add_row("contradiction", row, f"asks what {index.where(group[0], row)} asks, answers otherwise")
    for group in groups_by_key(index.answers, [row for row in rows if index.answers[row]]):
        for row in group[1:]:
            if index.asks[row] != index.asks[group[0]]:
                index.add_row("same-answer", row, f"has the answer of {index.where(group[0], row)}")
    for row, (other, similarity) in sorted(near_pairs(index.questions, rows, NEAR).items()):
        if index.asks[row] != index.asks[other]:
            index.add_row("near-duplicate", row, f"is nearly {index.where(other, row)} (similarity {similarity:.2f})")


def _leaks(index: RowIndex, train: Sequence[int], prompts: Sequence[int]) -> dict[str, Any] | None:
    """Find rows that ask what a prompt asks; return figures of the nearest rows, None without prompts."""
    if not prompts:
        return None
    asked = {index.asks[prompt]: prompt for prompt in reversed(prompts)}
    for row in train:
        questions = (*index.earlier.get(row, ()), index.asks[row])
        if (prompt := next((asked[each] for each in questions if each in asked), None)) is not None:
            index.add_row("leak", row, f"is also {index.where(prompt, row)}")
    few = len(train) * len(prompts) <= FIGURE_PAIRS
    found = nearest(index.questions, prompts, train, FIGURE_NEAR if few else NEAR)
    for prompt, (row, similarity) in sorted(found.items()):
        if similarity >= NEAR and index.asks[row] != index.asks[prompt]:
            index.add_row("near-leak", row, f"is nearly {index.where(prompt, row)} (similarity {similarity:.2f})")
    closest = sorted(found.items(), key=lambda item: -item[1][1])[:5]
    return {
        "prompts": len(prompts),
        "highest": round(closest[0][1][1], 3) if closest else None,
        "looked_for_from": FIGURE_NEAR if few else NEAR,
        "closest": [
            {
                "file": index.files[index.file[row]],
                "line": index.line[row],
                "prompt_file": index.files[index.file[prompt]],
                "prompt": index.line[prompt],
                "similarity": round(similarity, 3),
            }
            for prompt, (row, similarity) in closest
        ],
    }


def _lengths(index: RowIndex, train: Sequence[int], max_length: int, counter: TokenCounter | None) -> dict[str, Any]:
    """Figures of the sample in tokens, or of all rows in characters; find too long rows that were not counted yet."""
    if counter is None:
        return figures.length_figures([index.characters[row] for row in train], "characters", None)
    counts = {row: counter(given.row) for row, given in index.sample}
    for row, tokens in sorted(counts.items()):
        if tokens > max_length and not figures.is_always_counted(index.characters[row], max_length):
            index.add_row("length", row, figures.too_many_tokens(tokens, max_length))
    return figures.length_figures(list(counts.values()), "tokens", max_length)


def _languages(index: RowIndex, language: str) -> dict[str, Any]:
    """Find rows of the sample with a turn in another language, where most rows have none; return the numbers."""
    named = LANGUAGES[language]
    judged = good = 0
    others: list[tuple[int, str]] = []
    for row, given in index.sample:
        graded = [
            (name, *is_in_language(text, language))
            for name, text in ((name, text[:MAX_CHARACTERS]) for name, text in given.turns())
            if _has_prose(text, language)
        ]
        judged += bool(graded)
        wrong = [(name, confidence) for name, yes, confidence in graded if not yes]
        good += bool(graded) and not wrong
        for name, confidence in wrong[:1]:
            what = f"the prose of {name} with its question" if given.named else "its prose"
            others.append((row, f"{what} is not {named} (confidence in {named} {confidence:.2f})"))
    if judged and good / judged >= MAJORITY:
        for row, message in sorted(others):
            index.add_row("language", row, message)
    return {"language": language, "rows": len(index.sample), "judged": judged, "in_language": good}


def _has_prose(text: str, language: str) -> bool:
    words = prose(text, language)
    return (count_words(words, language) if language in UNSPACED else len(words.split())) >= MIN_WORDS


def _balance(index: RowIndex) -> None:
    """Find categories and topics with few rows, and rows that have no category where others have one."""
    for name, place in (("category", 0), ("topic", 1)):
        sizes: defaultdict[str, int] = defaultdict(int)
        for group, count in index.groups.items():
            sizes[group[place]] += count
        total, kinds = sum(sizes.values()), len(sizes)
        for value, count in sorted(sizes.items()):
            if value and count * kinds < SPARSE * total:
                message = f"{name} {printable(value)!r}: {count} of {total} rows, an equal share is {total // kinds}"
                index.add("balance", index.files[0], 0, message)
        if name == "category" and kinds > 1 and sizes.get("", 0):
            for row in index.unlabelled:
                index.add_row("balance", row, "has no category, as others have")
