"""How long a training's rows are, in tokens: counted where the base and the split are there, else by their characters.

In: a recipe and its build folder. Out: `Rows`. What is wrong with a row is the data stage's to say. Needs no torch.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutor.artifacts.layout import BuildFolder
from tutor.errors import TutorError
from tutor.formats.models.model_folder import load_tokenizer, read_json
from tutor.machine.memory.batching import most_tokens, passes_of
from tutor.prompt import encode
from tutor.recipe.settings import Recipe, TrainSettings

FEWEST, USUAL = 2.2, 2.6
"""Characters a token of Spanish with code: the least of the 278 rows, and all of them, in the 135M's vocabulary."""
MARKS = 40  # characters that the prompt contract adds to a row, at most


@dataclass(frozen=True)
class Rows:
    """How long the rows of a training are."""

    lengths: Sequence[int]  # tokens of each: as they are, or at most
    tokens: int  # of all rows that are trained on, about
    scored: int = 0  # of all that are held out, about
    exact: bool = False  # counted with the base's tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest row, at most."""
        return max(self.lengths)


def rows_of(recipe: Recipe, build: Path, base: Path) -> Rows | None:
    """The rows of the split, else of the recipe's file; None where they cannot be read. `base` is the base's stage."""
    folder = BuildFolder(build, recipe.name).stage("data")
    train, held_out = (_texts(folder / f"{name}.jsonl") for name in ("train", "held_out"))
    if train and held_out:
        counts = _counted(base, recipe, train), _counted(base, recipe, held_out)
        if counts[0] and counts[1]:
            return Rows(counts[0], sum(counts[0]), sum(counts[1]), exact=True)
        sizes = [_characters(row, recipe.system) for row in train]
        scored = sum(_characters(row, recipe.system) for row in held_out)
        return Rows(_most(sizes), round(sum(sizes) / USUAL), round(scored / USUAL))
    texts = train or _texts(recipe.resolve(recipe.data.train))
    if not texts:
        return None
    sizes = [_characters(row, recipe.system) for row in texts]
    tokens = min(len(sizes), recipe.data.rows or len(sizes)) * sum(sizes) / len(sizes) / USUAL
    share = 0.0 if train else recipe.data.held_out
    return Rows(_most(sizes), round((1 - share) * tokens), round(share * tokens))


def pass_tokens(settings: TrainSettings, rows: Rows | None) -> tuple[int, int]:
    """Tokens of the largest pass and of the longest row: as they are where rows were counted, else at most."""
    limit = settings.max_length
    if rows is None:
        return most_tokens(settings, [limit] * settings.batch_size * settings.accumulation), limit
    lengths = [min(limit, length) for length in rows.lengths]  # a longer one is an error
    tokens = passes_of(settings, lengths).tokens if rows.exact else most_tokens(settings, lengths)
    return tokens, max(lengths)


def _texts(path: Path) -> list[tuple[str, str]]:
    """Questions and answers of a file; none where it is no file of rows, or one is not as it should be."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        for line in path.read_text("utf-8").split("\n") if path.is_file() else ():
            if line.strip():
                row = json.loads(line)
                found.append((row["instruction"] + "", row["response"] + ""))
        return found
    return []


def _counted(base: Path, recipe: Recipe, texts: Iterable[tuple[str, str]]) -> list[int]:
    """Tokens of each row as the train stage will encode it; none where the base or transformers is not there."""
    with contextlib.suppress(TutorError, OSError, ImportError, KeyError):
        facts = read_json(base / "base.json")
        if facts["source"] == recipe.base.source:
            tokenizer = load_tokenizer((base / str(facts["model"])).resolve())
            return [len(encode(tokenizer, *row, recipe.system).ids) for row in texts]
    return []


def _characters(row: tuple[str, str], system: str) -> int:
    return len(row[0]) + len(row[1]) + len(system) + MARKS


def _most(sizes: Iterable[int]) -> list[int]:
    return [math.ceil(size / FEWEST) for size in sizes]
