"""Lengths of a training's rows in tokens: counted with the base's tokenizer, or estimated from their characters.

In: a recipe and its build folder. Out: `RowLengths`. Does not validate rows: the data stage does. Needs no torch; to
count tokens it needs transformers.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json
from tutor.artifacts.layout import BuildFolder
from tutor.engines.answer_limit import longest_answer
from tutor.errors import TutorError
from tutor.formats.importing.reading import open_rows
from tutor.formats.rows.jsonl import Limits
from tutor.formats.rows.row_ids import row_encoder
from tutor.formats.rows.split_files import HELD_OUT, TRAIN, read_split
from tutor.machine.memory.batching import max_tokens, split_step
from tutor.recipe.settings import Recipe, TrainSettings

MIN_CHARACTERS = 2.2
"""Fewest characters per token of Spanish with code: the minimum of the 278 rows in the 135M's vocabulary."""

MEAN_CHARACTERS = 2.6
"""Mean characters per token of the 278 rows in the 135M's vocabulary."""

PROMPT_CHARACTERS = 40
"""Maximum characters that the prompt contract adds to a row."""


@dataclass(frozen=True)
class RowLengths:
    """Lengths of the rows of a training."""

    lengths: Sequence[int]  # tokens of each row: counted, or an upper bound
    tokens: int  # of all training rows, about
    scored: int = 0  # tokens of all held-out rows, about
    exact: bool = False  # counted with the base's tokenizer
    answer: int | None = None  # tokens of the longest answer of all rows, counted; None: not counted

    @property
    def longest(self) -> int:
        """Tokens of the longest row: counted, or an upper bound."""
        return max(self.lengths)


def count_rows(recipe: Recipe, data: Path, base: Path) -> RowLengths:
    """Counted lengths of the rows of a data stage, with the tokenizer of a base stage.

    Raises ArtifactError where the base or the rows cannot be read.
    """
    encoder = row_encoder(recipe, base)
    train, held_out = (
        [each for row in read_split(data, name) for each in encoder.encode(row)] for name in (TRAIN, HELD_OUT)
    )
    lengths = [len(each.ids) for each in train]
    answer = longest_answer([*train, *held_out])["tokens"]
    return RowLengths(lengths, sum(lengths), sum(len(each.ids) for each in held_out), exact=True, answer=answer)


def find_row_lengths(recipe: Recipe, build: Path, base: Path) -> RowLengths | None:
    """The best known lengths: of the split, else of the recipe's file; None where no rows can be read.

    `base` is the folder of the base stage, whose tokenizer counts where it is the recipe's base.
    """
    data = BuildFolder(build, recipe.name).stage("data")
    train, held_out = (_sizes(data / name, recipe.system) for name in (TRAIN, HELD_OUT))
    if train and held_out:
        with contextlib.suppress(TutorError, OSError, ImportError, KeyError, ValueError):
            if read_json(base / "base.json")["source"] == recipe.base.source:
                return count_rows(recipe, data, base)
        counted, scored = (round(sum(sizes) / MEAN_CHARACTERS) for sizes in (train, held_out))
        return RowLengths(_upper_bounds(train), counted, scored)
    sizes = train or _sizes(recipe.resolve(recipe.data.train), recipe.system)
    if not sizes:
        return None
    tokens = min(len(sizes), recipe.data.rows or len(sizes)) * sum(sizes) / len(sizes) / MEAN_CHARACTERS
    share = 0.0 if train else recipe.data.held_out
    return RowLengths(_upper_bounds(sizes), round((1 - share) * tokens), round(share * tokens))


def largest_batch(settings: TrainSettings, rows: RowLengths | None, world_size: int = 1) -> tuple[int, int]:
    """Tokens of the largest micro-batch and of the longest row: exact for counted rows, else upper bounds."""
    limit = settings.max_length
    if rows is None:
        return max_tokens(settings, [limit] * settings.batch_size * settings.accumulation), limit
    lengths = [min(limit, length) for length in rows.lengths]  # the train stage refuses longer rows
    tokens = split_step(settings, lengths, world_size).tokens if rows.exact else max_tokens(settings, lengths)
    return tokens, max(lengths)


def _sizes(path: Path, system: str) -> list[int]:
    """Characters of the rows of a file; empty where the path does not exist, or any of its rows is malformed."""
    with contextlib.suppress(TutorError, OSError, ValueError, KeyError, TypeError):
        rows = (row for _, row in open_rows(path, Limits(), Counter())) if path.is_file() or path.is_dir() else ()
        return [_characters(row) + len(system) for row in rows]
    return []


def _characters(row: Any) -> int:
    """Characters of a row as it is trained, the prompt's own texts included."""
    if not isinstance(row, dict):
        raise TypeError("a row is no object")
    messages = [*row.get("history", ()), *row.get("messages", ())]
    if "messages" not in row:
        messages.append({"content": row["instruction"] + row["response"], "reasoning": row.get("reasoning", "")})
    texts = [message["content"] + message.get("reasoning", "") for message in messages]
    return sum(map(len, texts)) + PROMPT_CHARACTERS * len(texts)


def _upper_bounds(sizes: Iterable[int]) -> list[int]:
    return [math.ceil(size / MIN_CHARACTERS) for size in sizes]
