"""The ways to get an answer that `tutor baselines` compares, as prompts: the base alone, helped in several ways, tuned.

In: the prompts and the training rows of a recipe, a function that counts the tokens of a prompt. Out: ways, each with
its prompts, its system text and the context that it needs; the reason why a way is left out. Asks no model. Examples
and similar rows come from the training split, which holds no held-out row.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tutor.formats.markdown import fenced_blocks
from tutor.recipe.settings import Recipe
from tutor.serving.evaluation.examples import fixed_examples, similar_rows, with_examples

Row = Mapping[str, Any]

EXAMPLES = (1, 3, 5)
"""Numbers of rows that the base is shown."""
CONTEXT_STEP = 256
"""Multiple of tokens to which a context is rounded up."""


@dataclass(frozen=True)
class Way:
    """One way to ask all prompts."""

    name: str
    model: str  # "base" or "tutor"
    prompts: Sequence[Row]  # in the order of the recipe's, with examples as earlier turns
    system: str = ""
    context: int = 0  # tokens of the server's context
    similar: bool = False  # with the most similar rows; of several such ways the largest that fits is asked

    @property
    def tuned(self) -> bool:
        """Whether the model is the tuned one."""
        return self.model != "base"


@dataclass(frozen=True)
class Room:
    """Tokens that the base has for a prompt and its answer."""

    answer: int  # maximum tokens of an answer
    context: int  # those of the recipe, the minimum
    limit: int  # those that the base was trained for


def system_text(recipe: Recipe, training: Sequence[Row]) -> str:
    """Return the recipe's system text, else one that states the form of the training answers: length and code."""
    if recipe.system:
        return recipe.system
    words = statistics.median(len(row["response"].split()) for row in training)
    fences = [blocks[0].language for row in training if (blocks := fenced_blocks(row["response"]))]
    code = ""
    if 2 * len(fences) >= len(training):
        language = Counter(fences).most_common(1)[0][0]
        code = f" Show code in one fenced block{f' marked {language}' if language else ''}."
    return f"Answer the question directly, in about {max(5, round(words, -1)):.0f} words, and stop there.{code}"


def base_ways(recipe: Recipe, prompts: Sequence[Row], training: Sequence[Row], system: str) -> list[Way]:
    """Return the ways to ask the base, the cheapest first."""
    ways = [Way("base", "base", prompts), Way("base + system text", "base", prompts, system)]
    counts = [count for count in EXAMPLES if count <= len(training)]
    for count in counts:
        shown = fixed_examples(training, count, recipe.seed)
        name = f"base + {count} example{'s' if count > 1 else ''}"
        ways.append(Way(name, "base", [with_examples(row, shown) for row in prompts]))
    similar = similar_rows(training, prompts, max(counts), recipe.data.language)
    for count in counts:
        # The most similar row stands last, next to the question.
        found = [with_examples(row, rows[:count][::-1]) for row, rows in zip(prompts, similar, strict=True)]
        ways.append(Way(f"base + {count} similar row{'s' if count > 1 else ''}", "base", found, similar=True))
    return ways


def fit(ways: Sequence[Way], room: Room, count: Callable[[Way, Row], int]) -> tuple[list[Way], dict[str, str]]:
    """Return the ways whose every prompt fits into the base's context, and the reason for each other way by its name.

    `count` returns the tokens of a prompt in a way. A way with a prompt that does not fit is left out as a whole: the
    ways are compared on equal prompts. The base alone is always asked: its answers show what does not fit. Of the ways
    with similar rows, the one with most rows is kept.
    """
    kept, left_out = [], {}
    for way in ways:
        longest = max(count(way, row) for row in way.prompts)
        needed = -(-(longest + room.answer) // CONTEXT_STEP) * CONTEXT_STEP
        if longest + room.answer > room.limit and way is not ways[0]:
            left_out[way.name] = (
                f"its longest prompt has {longest:,} tokens and an answer up to {room.answer:,}, more than the base's "
                f"context of {room.limit:,}"
            )
        else:
            kept.append(replace(way, context=min(max(needed, room.context), room.limit)))
    most = next((way for way in reversed(kept) if way.similar), None)
    return [way for way in kept if not way.similar or way is most], left_out
