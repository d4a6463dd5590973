"""The linter for anybody's pairs. In: files of rows. Out: findings, each with its line, and figures to look at.

Rows stream through once: what is kept of one are hashes, some hundred bytes, and the texts of a sample. Changes
nothing, and refuses nothing: which findings are faults is for whoever reads them, or --strict.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutor.errors import RecipeError
from tutor.formats.rows.json_values import printable
from tutor.formats.rows.jsonl import Limits
from tutor.graders.language import MIN_WORDS, is_spanish, prose
from tutor.stages.data.lint import figures
from tutor.stages.data.lint.near_duplicates import near_pairs, nearest, same
from tutor.stages.data.lint.rows import Finding, Seen, take_file

KINDS = {
    "schema": "rows that the data stage refuses",
    "unknown-key": "keys that are dropped",
    "special-token": "texts that a tokenizer or a template may read as a token of its own",
    "fence": "code fences that do not close",
    "length": "rows longer than train.max_length: they would be cut, or refused",
    "duplicate": "rows that repeat another one",
    "near-duplicate": "questions nearly like another one",
    "same-answer": "answers that are given to several questions",
    "contradiction": "questions that are answered in two ways",
    "leak": "questions that are also held-out prompts",
    "near-leak": "questions nearly like a held-out prompt",
    "language": "rows that are not in Spanish, where most are",
    "balance": "categories and topics with few rows, and rows without",
}
NEAR = 0.6
"""The share of their words and word pairs from which two questions are reported as nearly the same.

A question of six words with another word for one of them keeps 0.57, and is mostly about another thing.
"""
FIGURE_NEAR = 0.2
FIGURE_PAIRS = 500_000
"""Up to so many pairs of row and prompt, the nearest row of every prompt is looked for down to FIGURE_NEAR."""
MAJORITY = 0.8
"""With less than this share in Spanish a set is not a Spanish one, and its rows are not reported for it."""
LOOKED_AT = 20_000
"""Characters of a row that its language is judged by."""
SPARSE = 0.25
"""Of an equal share: a category with less is reported."""


@dataclass(frozen=True)
class Report:
    """Findings (at most LISTED of a kind), their counts, and figures as JSON holds them."""

    files: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]
    counts: dict[str, int]
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {**asdict(self), "findings": [asdict(each) for each in self.findings]}


def lint(
    files: Sequence[Path],
    against: Path | None = None,
    *,
    max_length: int,
    tokenizer: Path | None = None,
    system: str = "",
    limits: Limits | None = None,
) -> Report:
    """Look through pairs in `files` and, for what leaks into it, the held-out prompts in `against`.

    `max_length` is in tokens, `system` included; without `tokenizer`, a tokenizer.json, lengths are in characters.
    Raises RecipeError or DataError where a file as a whole cannot be read, ArtifactError for a damaged tokenizer.
    """
    if against and against in files:
        raise RecipeError(f"{against} is both looked through and held out", "name another file for one of them")
    seen = Seen()
    sizes = {}
    counter = figures.token_counter(tokenizer, system) if tokenizer else None
    for path in [*files, *([against] if against else [])]:
        if path is against:
            seen.held_out = str(path)
        sizes[str(path)] = take_file(path, seen, limits or Limits(), figures.too_long(max_length, counter))
    train, prompts = seen.side(held_out=False), seen.side(held_out=True)
    for rows in (train, prompts):
        _repeats(seen, rows)
    leaks = _leaks(seen, train, prompts)
    languages = _languages(seen)
    lengths = _lengths(seen, train, max_length, counter)
    _balance(seen)
    order = {name: number for number, name in enumerate(KINDS)}
    return Report(
        files=sizes,
        findings=tuple(sorted(seen.findings, key=lambda each: (order[each.kind], each.file, each.line))),
        counts={kind: seen.counts[kind] for kind in KINDS if seen.counts[kind]},
        figures={
            "rows": len(train),
            "groups": figures.cross_table(seen.groups),
            "lengths": lengths,
            "language": languages,
            "nearest": leaks,
        },
    )


def _repeats(seen: Seen, rows: Sequence[int]) -> None:
    """Find rows of one side that say again, or say otherwise, what another one says."""
    for group in same(seen.asks, rows):
        first: dict[int, int] = {}
        for row in group:
            earlier = first.setdefault(seen.answers[row], row)
            if earlier != row:
                seen.note_row("duplicate", row, f"repeats {seen.place(earlier, row)}")
            elif len(first) > 1:
                seen.note_row("contradiction", row, f"asks what {seen.place(group[0], row)} asks, answers otherwise")
    for group in same(seen.answers, [row for row in rows if seen.answers[row]]):
        for row in group[1:]:
            if seen.asks[row] != seen.asks[group[0]]:
                seen.note_row("same-answer", row, f"has the answer of {seen.place(group[0], row)}")
    for row, (other, similarity) in sorted(near_pairs(seen.questions, rows, NEAR).items()):
        if seen.asks[row] != seen.asks[other]:
            seen.note_row("near-duplicate", row, f"is nearly {seen.place(other, row)} (similarity {similarity:.2f})")


def _leaks(seen: Seen, train: Sequence[int], prompts: Sequence[int]) -> dict[str, Any] | None:
    """Find rows that ask what a prompt asks; how near the nearest rows are, None without prompts."""
    if not prompts:
        return None
    asked = {seen.asks[prompt]: prompt for prompt in reversed(prompts)}
    for row in train:
        if (prompt := asked.get(seen.asks[row])) is not None:
            seen.note_row("leak", row, f"is also {seen.place(prompt, row)}")
    few = len(train) * len(prompts) <= FIGURE_PAIRS
    found = nearest(seen.questions, prompts, train, FIGURE_NEAR if few else NEAR)
    for prompt, (row, similarity) in sorted(found.items()):
        if similarity >= NEAR and seen.asks[row] != seen.asks[prompt]:
            seen.note_row("near-leak", row, f"is nearly {seen.place(prompt, row)} (similarity {similarity:.2f})")
    closest = sorted(found.items(), key=lambda item: -item[1][1])[:5]
    return {
        "prompts": len(prompts),
        "highest": round(closest[0][1][1], 3) if closest else None,
        "looked_for_from": FIGURE_NEAR if few else NEAR,
        "closest": [
            {
                "file": seen.files[seen.file[row]],
                "line": seen.line[row],
                "prompt_file": seen.files[seen.file[prompt]],
                "prompt": seen.line[prompt],
                "similarity": round(similarity, 3),
            }
            for prompt, (row, similarity) in closest
        ],
    }


def _lengths(seen: Seen, train: Sequence[int], max_length: int, counter: figures.Counts | None) -> dict[str, Any]:
    """Lengths in tokens of the sample, or of all rows in characters; finds too long rows that were not counted yet."""
    if counter is None:
        return figures.lengths([seen.characters[row] for row in train], "characters", None)
    counts = {row: counter(question, answer) for row, question, answer in seen.sample}
    for row, tokens in sorted(counts.items()):
        if tokens > max_length and not figures.is_surely_counted(seen.characters[row], max_length):
            seen.note_row("length", row, figures.too_many(tokens, max_length))
    return figures.lengths(list(counts.values()), "tokens", max_length)


def _languages(seen: Seen) -> dict[str, Any]:
    """Find rows of the sample that are not Spanish, where most are; how many were judged."""
    judged = []
    for row, question, answer in seen.sample:
        text = f"{question}\n\n{answer}"[:LOOKED_AT]
        if len(prose(text).split()) >= MIN_WORDS:
            judged.append((row, *is_spanish(text)))
    spanish = sum(yes for _, yes, _ in judged)
    if judged and spanish / len(judged) >= MAJORITY:
        for row, yes, confidence in sorted(judged):
            if not yes:
                seen.note_row("language", row, f"its prose is not Spanish (confidence in Spanish {confidence:.2f})")
    return {"rows": len(seen.sample), "judged": len(judged), "spanish": spanish}


def _balance(seen: Seen) -> None:
    """Find categories and topics with few rows, and rows that have no category where others have one."""
    for name, place in (("category", 0), ("topic", 1)):
        sizes: defaultdict[str, int] = defaultdict(int)
        for group, count in seen.groups.items():
            sizes[group[place]] += count
        total, kinds = sum(sizes.values()), len(sizes)
        for value, count in sorted(sizes.items()):
            if value and count * kinds < SPARSE * total:
                message = f"{name} {printable(value)!r}: {count} of {total} rows, an equal share is {total // kinds}"
                seen.note("balance", seen.files[0], 0, message)
        if name == "category" and kinds > 1 and sizes.get("", 0):
            for row in seen.unlabelled:
                seen.note_row("balance", row, "has no category, as others have")
