"""Split of an optimizer step's rows into micro-batches: packed into few, or padded as the recipe has them.

In: the rows' lengths in tokens and the recipe's settings. Out: `MicroBatches`, whose largest decides the memory of a
training. Plain numbers; needs no torch. Does not decide `train.pass_tokens = "auto"`: memory/plan.py does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from tutor.errors import RecipeError

if TYPE_CHECKING:
    from tutor.recipe.settings import TrainSettings

MAX_TOKENS = 4096
"""Maximum tokens of a packed micro-batch by default: larger ones are hardly faster (docs/benchmarks.md)."""


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of one optimizer step, on each of `world_size` ranks."""

    rows: int  # per micro-batch
    count: int  # per step and rank
    tokens: int  # of the largest possible micro-batch, padding included
    packed: bool
    world_size: int = 1

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step on all ranks."""
        return self.rows * self.count * self.world_size

    def __str__(self) -> str:
        way = "packed" if self.packed else "padded"
        ranks = f" in {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.step_rows} rows a step{ranks}, {self.rows} a micro-batch, {way}: at most {self.tokens:,} tokens"


def split_step(settings: "TrainSettings", lengths: Sequence[int], world_size: int = 1) -> MicroBatches:
    """The micro-batches of a recipe over rows of these lengths.

    Raises RecipeError when the ranks cannot share a step's rows equally.
    """
    step_rows = settings.batch_size * settings.accumulation
    if step_rows % world_size:
        raise RecipeError(
            f"{world_size} processes cannot share the {step_rows} rows of a step "
            "(train.batch_size x train.accumulation) equally",
            "start as many as divide them, or change train.accumulation",
        )
    rows = step_rows // world_size
    if settings.packing:
        batches = packed_batches(rows, lengths, token_limit(settings))
    else:
        size = math.gcd(settings.batch_size, rows)
        batches = padded_batches(size, rows // size, lengths)
    return replace(batches, world_size=world_size)


def token_limit(settings: "TrainSettings") -> int:
    """Maximum tokens of a packed micro-batch; for "auto" before memory reduces it."""
    return settings.pass_tokens if isinstance(settings.pass_tokens, int) else MAX_TOKENS


def max_tokens(settings: "TrainSettings", lengths: Sequence[int]) -> int:
    """Upper bound of the largest micro-batch's tokens, over rows that are at most this long."""
    longest = sorted(lengths, reverse=True)
    if not settings.packing:
        return min(settings.batch_size, len(longest)) * longest[0]
    return max(longest[0], min(token_limit(settings), sum(longest[: settings.batch_size * settings.accumulation])))


def packed_batches(step_rows: int, lengths: Sequence[int], limit: int) -> MicroBatches:
    """The fewest micro-batches of `step_rows` rows that stay within `limit` tokens for any choice of rows.

    All micro-batches of a step have the same number of rows, which divides `step_rows`: the trainer's sampler allows
    no other split. Where two rows exceed the limit, one row is a micro-batch, and may itself exceed it.
    """
    longest = [0, *accumulate(sorted(lengths, reverse=True))]
    sizes = [rows for rows in range(1, step_rows + 1) if step_rows % rows == 0]
    most = [longest[min(rows, len(lengths))] for rows in sizes]
    rows, tokens = max((size, total) for size, total in zip(sizes, most, strict=True) if size == 1 or total <= limit)
    return MicroBatches(rows, step_rows // rows, tokens, packed=rows > 1)


def padded_batches(rows: int, count: int, lengths: Sequence[int]) -> MicroBatches:
    """Micro-batches of the recipe's size, every row padded to the longest row of its micro-batch."""
    return MicroBatches(rows, count, min(rows, len(lengths)) * max(lengths), packed=False)
