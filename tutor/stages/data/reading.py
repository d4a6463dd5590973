"""Read the training and evaluation rows of a user's file, without duplicates.

In: a JSONL file. Out: examples or prompts, and notes on duplicates, conflicting answers and all that was tolerated.
Does not compare two files (splitting.py).
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tutor.formats.rows.examples import Example, Prompt
from tutor.formats.rows.jsonl import Limits
from tutor.formats.rows.rows import ExampleRow, Notes, PromptRow, read_rows
from tutor.prompt.messages import Message
from tutor.recipe.settings import Recipe
from tutor.stages.data.splitting import RowType, group_by_question

DEFAULT_LIMITS = Limits()


def row_limits(recipe: Recipe) -> Limits:
    """Return the limits for the rows of a recipe."""
    return Limits(turns_as_text=recipe.prompt != "tutor")


def read_examples(path: Path, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Example], Notes]:
    """Return the training rows of a file, exact duplicates once, and notes on what was tolerated.

    `strict`: an unknown key is an error. Raises as rows.read_rows.
    """
    rows, notes = read_rows(path, ExampleRow, strict=strict, limits=limits)
    examples = [
        Example(
            row.instruction, row.response, row.category, row.topic, tuple(row.code), line,
            history=_messages(row), reasoning=row.reasoning,
        )
        for line, row in rows
    ]  # fmt: skip
    kept, duplicates = _without_duplicates(examples, [_content(each) for each in examples])
    return kept, replace(notes, duplicates=duplicates, conflicts=_conflicts(kept))


def read_prompts(path: Path, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Prompt], Notes]:
    """Return the evaluation rows of a file, each question once, and notes. Raises as rows.read_rows."""
    rows, notes = read_rows(path, PromptRow, strict=strict, limits=limits)
    prompts = []
    for line, row in rows:
        expect = row.expect.model_dump(exclude_unset=True)
        given = (row.instruction, row.category, row.topic, tuple(row.code), expect, row.response, line)
        prompts.append(Prompt(*given, history=_messages(row)))
    kept, duplicates = _without_duplicates(prompts, [(each.instruction, str(each.history)) for each in prompts])
    return kept, replace(notes, duplicates=duplicates)


def _messages(row: ExampleRow | PromptRow) -> tuple[Message, ...]:
    return tuple(message.model_dump(exclude_defaults=True) for message in row.history)


def _content(example: Example) -> Hashable:
    return example.instruction, example.response, example.reasoning, str(example.history)


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
