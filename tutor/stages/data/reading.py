"""Read the training and evaluation rows of a user's file, without duplicates.

In: a JSONL file. Out: examples or prompts, and notes on duplicates, conflicting answers and all that was tolerated.
Does not compare two files (splitting.py).
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tutor.formats.rows.jsonl import Limits
from tutor.formats.rows.rows import Example, ExampleRow, Notes, Prompt, PromptRow, read_rows
from tutor.stages.data.splitting import RowType, group_by_question

DEFAULT_LIMITS = Limits()


def read_examples(path: Path, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Example], Notes]:
    """Return the training rows of a file, exact duplicates once, and notes on what was tolerated.

    `strict`: an unknown key is an error. Raises as rows.read_rows.
    """
    rows, notes = read_rows(path, ExampleRow, strict=strict, limits=limits)
    examples = [
        Example(row.instruction, row.response, row.category, row.topic, tuple(row.code), line) for line, row in rows
    ]
    kept, duplicates = _without_duplicates(examples, [(each.instruction, each.response) for each in examples])
    return kept, replace(notes, duplicates=duplicates, conflicts=_conflicts(kept))


def read_prompts(path: Path, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Prompt], Notes]:
    """Return the evaluation rows of a file, each question once, and notes. Raises as rows.read_rows."""
    rows, notes = read_rows(path, PromptRow, strict=strict, limits=limits)
    prompts = []
    for line, row in rows:
        expect = row.expect.model_dump(exclude_unset=True)
        prompts.append(Prompt(row.instruction, row.category, row.topic, tuple(row.code), expect, row.response, line))
    kept, duplicates = _without_duplicates(prompts, [each.instruction for each in prompts])
    return kept, replace(notes, duplicates=duplicates)


def _without_duplicates(
    rows: Iterable[RowType], keys: Iterable[Hashable]
) -> tuple[list[RowType], tuple[tuple[int, int], ...]]:
    first: dict[Hashable, int] = {}
    kept, dropped = [], []
    for row, key in zip(rows, keys, strict=True):
        if key in first:
            dropped.append((row.line, first[key]))
        else:
            first[key] = row.line
            kept.append(row)
    return kept, tuple(dropped)


def _conflicts(examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
    groups = group_by_question(examples).values()
    return tuple(tuple(each.line for each in group) for group in groups if len({each.response for each in group}) > 1)
