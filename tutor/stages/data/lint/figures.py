"""The linter's figures: lengths with a histogram, rows by category and topic.

In: texts, lengths or counts. Out: figures as JSON values, and the check of a row's length. Reads no file.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tutor.stages.data.base_tokens import TokenCounter
from tutor.stages.data.lint.conversations import RowTurns

MAX_CHARACTERS_PER_TOKEN = 4
"""Upper bound of characters per token. Without a tokenizer, a row above limit x this bound is certainly too long."""
MIN_CHARACTERS_PER_TOKEN = 2
"""Lower bound of characters per token. A row below limit x this bound is counted only if it is in the sample."""
BARS = 12
"""Number of bars that a histogram has at most; one more where the last one holds the maximum alone."""


def length_check(max_length: int, counter: TokenCounter | None) -> Callable[[RowTurns], str | None]:
    """Return a function that explains why a row is too long; it counts tokens only of rows that may be too long."""

    def why(given: RowTurns) -> str | None:
        characters = sum(len(text) for _, text in given.texts())
        if counter is None:
            certain = characters > MAX_CHARACTERS_PER_TOKEN * max_length
            return f"{characters} characters; train.max_length is {max_length} tokens" if certain else None
        if not is_always_counted(characters, max_length):
            return None
        tokens = counter(given.row)
        return too_many_tokens(tokens, max_length) if tokens > max_length else None

    return why


def is_always_counted(characters: int, max_length: int) -> bool:
    """Whether the tokens of a row of this length are counted even outside the sample."""
    return characters > MIN_CHARACTERS_PER_TOKEN * max_length


def too_many_tokens(tokens: int, max_length: int) -> str:
    """Return the message of a row that has too many tokens."""
    return f"{tokens} tokens; train.max_length is {max_length}"


def length_figures(values: Sequence[int], unit: str, limit: int | None) -> dict[str, Any]:
    """Return minimum, median and maximum of some lengths, the number over the limit, and their histogram."""
    ordered = sorted(values) or [0]
    return {
        "unit": unit,
        "rows": len(values),
        "limit": limit,
        "over": None if limit is None else sum(value > limit for value in values),
        "min": ordered[0],
        "median": statistics.median_low(ordered),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],
        "max": ordered[-1],
        "bars": histogram(values),
    }


def histogram(values: Iterable[int]) -> list[dict[str, int]]:
    """Return bars of equal, round width from 0: `start`, `end` (the first value beyond) and `rows`."""
    counted = list(values)
    if not counted:
        return []
    most = max(counted)
    width = next(step * 10**power for power in range(12) for step in (1, 2, 5) if step * 10**power * BARS > most)
    bars = Counter(value // width for value in counted)
    return [{"start": bar * width, "end": (bar + 1) * width, "rows": bars[bar]} for bar in range(most // width + 1)]


def cross_table(groups: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Return the names of categories and topics, and the counts of rows, a list a category."""
    categories = sorted({category for category, _ in groups})
    topics = sorted({topic for _, topic in groups})
    return {
        "categories": categories,
        "topics": topics,
        "rows": [[groups.get((category, topic), 0) for topic in topics] for category in categories],
    }
