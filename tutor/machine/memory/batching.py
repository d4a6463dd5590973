"""How the rows of an optimizer step go through the model: packed into few passes, or padded. Plain numbers; no torch.

In: the rows' lengths in tokens and the recipe's numbers. Out: `Passes`, whose largest decides what training takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tutor.recipe.settings import TrainSettings

LARGEST = 4096
"""Tokens of a packed pass beyond which it is hardly quicker (docs/benchmarks.md), and its memory grows all the same."""


@dataclass(frozen=True)
class Passes:
    """How the rows of one optimizer step go through the model."""

    rows: int  # a pass
    count: int  # passes a step
    tokens: int  # of the largest pass that can come, padding included
    packed: bool
    processes: int = 1  # each takes its share of a step's rows, in so many passes

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, in all processes."""
        return self.rows * self.count * self.processes

    def __str__(self) -> str:
        way = "packed" if self.packed else "padded"
        shared = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"{self.step_rows} rows a step{shared}, {self.rows} a pass, {way}: at most {self.tokens:,} tokens"


def passes_of(settings: "TrainSettings", lengths: Sequence[int], count: int = 1) -> Passes:
    """The passes of a recipe over rows of these lengths, in each of `count` processes that share a step's rows."""
    rows = settings.batch_size * settings.accumulation // count
    if settings.packing:
        passes = packed_passes(rows, lengths, limit(settings))
    else:
        size = math.gcd(settings.batch_size, rows)
        passes = padded_passes(size, rows // size, lengths)
    return replace(passes, processes=count)


def limit(settings: "TrainSettings") -> int:
    """Tokens of a packed pass at most, where memory does not say less."""
    return settings.pass_tokens if isinstance(settings.pass_tokens, int) else LARGEST


def most_tokens(settings: "TrainSettings", lengths: Sequence[int]) -> int:
    """Tokens that the largest pass has at most, over rows that are not longer than these lengths."""
    longest = sorted(lengths, reverse=True)
    if not settings.packing:
        return min(settings.batch_size, len(longest)) * longest[0]
    return max(longest[0], min(limit(settings), sum(longest[: settings.batch_size * settings.accumulation])))


def packed_passes(step_rows: int, lengths: Sequence[int], budget: int) -> Passes:
    """As few passes for `step_rows` rows as keep any pass within `budget` tokens, whichever rows meet in it.

    All passes of a step have the same number of rows, so that number divides `step_rows`: the trainer's sampler cuts
    no other way. One row a pass, which may itself be longer, where not even two fit.
    """
    longest = [0, *accumulate(sorted(lengths, reverse=True))]
    sizes = [rows for rows in range(1, step_rows + 1) if step_rows % rows == 0]
    most = [longest[min(rows, len(lengths))] for rows in sizes]
    rows, tokens = max((size, total) for size, total in zip(sizes, most, strict=True) if size == 1 or total <= budget)
    return Passes(rows, step_rows // rows, tokens, packed=rows > 1)


def padded_passes(rows: int, count: int, lengths: Sequence[int]) -> Passes:
    """Passes as the recipe has them, every row padded to the longest of its pass."""
    return Passes(rows, count, min(rows, len(lengths)) * max(lengths), packed=False)
