"""The linter's figures: lengths with a histogram, rows by category and topic. Pure, but for reading a tokenizer."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError
from tutor.prompt import conversation, render

Counts = Callable[[str, str], int]
"""Tokens of a question with its answer, as training has them."""

CHARACTERS_A_TOKEN = 4
"""More than any tokenizer gets into a token of Spanish or code: without one, a row that is too long even so, is."""
SURE_CHARACTERS = 2
"""A row of fewer characters for each token of the limit is only counted where it is in the sample."""
BARS = 12


def token_counter(tokenizer: Path, system: str = "") -> Counts:
    """How many tokens a row has by this tokenizer.json, BOS and EOS included. Raises ArtifactError if it is damaged."""
    from tokenizers import Tokenizer

    try:
        text = tokenizer.read_text("utf-8")
        json.loads(text)  # of a file that was cut short the package says nothing narrower than Exception
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{tokenizer} is damaged: {error}", "run: tutor base") from None
    made = Tokenizer.from_str(text)

    def count(question: str, answer: str) -> int:
        return len(made.encode(f"{render(conversation(question, system))} {answer}").ids) + 1

    return count


def too_long(max_length: int, counter: Counts | None) -> Callable[[str, str], str | None]:
    """A function that says why a row is too long; it counts tokens only where a row is long enough for that."""

    def why(question: str, answer: str) -> str | None:
        characters = len(question) + len(answer)
        if counter is None:
            surely = characters > CHARACTERS_A_TOKEN * max_length
            return f"{characters} characters; train.max_length is {max_length} tokens" if surely else None
        if not is_surely_counted(characters, max_length):
            return None
        tokens = counter(question, answer)
        return too_many(tokens, max_length) if tokens > max_length else None

    return why


def is_surely_counted(characters: int, max_length: int) -> bool:
    """Whether a row's tokens are counted even when it is not in the sample."""
    return characters > SURE_CHARACTERS * max_length


def too_many(tokens: int, max_length: int) -> str:
    """The words for it."""
    return f"{tokens} tokens; train.max_length is {max_length}"


def lengths(values: Sequence[int], unit: str, limit: int | None) -> dict[str, Any]:
    """Smallest, middle and largest of some lengths, how many are over the limit, and their histogram."""
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
    """At most BARS bars of equal, round width from 0: `start`, `end` (the first value beyond) and `rows`."""
    counted = list(values)
    if not counted:
        return []
    most = max(counted)
    width = next(step * 10**power for power in range(12) for step in (1, 2, 5) if step * 10**power * BARS > most)
    bars = Counter(value // width for value in counted)
    return [{"start": bar * width, "end": (bar + 1) * width, "rows": bars[bar]} for bar in range(most // width + 1)]


def cross_table(groups: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Rows by category and topic: the names of both, and the counts, a list a category."""
    categories = sorted({category for category, _ in groups})
    topics = sorted({topic for _, topic in groups})
    return {
        "categories": categories,
        "topics": topics,
        "rows": [[groups.get((category, topic), 0) for topic in topics] for category in categories],
    }
