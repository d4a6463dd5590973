"""The data stage. In: the user's JSONL. Out: train and held-out rows that share no question, prompts, statistics.

Every row is checked before any is used (rows.py). Knows no tokenizer: whether a row fits is the train stage's audit.
"""

import hashlib
import itertools
import json
import re
import statistics as figures
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from tutor.errors import ArtifactError, DataError, RecipeError
from tutor.formats.markdown import fence_languages
from tutor.formats.rows.jsonl import Limits, check_file
from tutor.formats.rows.rows import Example, ExampleRow, Notes, Prompt, PromptRow, read_rows
from tutor.recipe.settings import Recipe

__all__ = [
    "Example",
    "Limits",
    "Notes",
    "Prompt",
    "input_files",
    "load_split",
    "normalise",
    "read_examples",
    "read_prompts",
    "run",
    "sample",
    "split",
    "statistics",
    "without_leaks",
]

TRAIN, HELD_OUT, PROMPTS, STATISTICS = "train.jsonl", "held_out.jsonl", "prompts.jsonl", "statistics.json"
DEFAULT_LIMITS = Limits()

_ACCENTS = re.compile("[\u0300-\u036f]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_PROSE_MARKS = re.compile(r"[^0-9a-z\x80-\U0010ffff]+")

Kept = TypeVar("Kept", Example, Prompt)
Key = TypeVar("Key", bound=Hashable)


def run(recipe: Recipe, inputs: Mapping[str, Path], out: Path, *, strict: bool = False) -> dict[str, Any]:
    """Read, check, split and write the recipe's rows into `out`; a summary. Strict: unknown keys and leaks are errors.

    Raises RecipeError (no such file), DataError (rows that are not usable, or too few), ArtifactError (input changed).
    """
    del inputs
    files = input_files(recipe)
    examples, notes = read_examples(files["train"], strict=strict)
    prompts, prompt_notes = read_prompts(files["eval"], strict=strict)
    clean, leaks = without_leaks(examples, prompts)
    if leaks and (strict or not clean):
        raise DataError(
            f"{files['train']}: {len(leaks)} of {len(examples)} rows ask what {files['eval']} asks",
            "delete them from one of the two",
            tuple(f"{files['train']}:{line}: also {files['eval']}:{other}" for line, other in leaks[:20]),
        )
    chosen = sample(clean, recipe.data.rows, recipe.seed)
    train, held_out = split(chosen, recipe.data.held_out, recipe.seed)
    asked = sample(prompts, recipe.data.prompts, recipe.seed)
    report = {
        "train": statistics(train),
        "held_out": statistics(held_out),
        "removed_from_train": [{"line": line, "eval_line": other} for line, other in leaks],
        "notes": {"train": notes.as_dict(), "eval": prompt_notes.as_dict()},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in ((TRAIN, train), (HELD_OUT, held_out), (PROMPTS, asked)):
        _write(out / name, (json.dumps(asdict(row), ensure_ascii=False) for row in rows))
    _write(out / STATISTICS, [json.dumps(report, ensure_ascii=False, indent=1)])
    removed = [f"{notes.file}: {len(leaks)} rows removed, for {prompt_notes.file} asks them too"] if leaks else []
    return {
        "rows": notes.rows,
        "train": len(train),
        "held_out": len(held_out),
        "prompts": len(asked),
        "notes": [*notes.warnings(), *prompt_notes.warnings(), *removed],
    }


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(text + "\n" for text in texts)


def load_split(folder: Path) -> tuple[list[Example], list[Example], list[Prompt]]:
    """Train rows, held-out rows and prompts, as `run` wrote them. Raises ArtifactError when a file is damaged."""
    train, held_out = (_read_back(folder / name, Example) for name in (TRAIN, HELD_OUT))
    return train, held_out, _read_back(folder / PROMPTS, Prompt)


def _read_back(path: Path, make: type[Kept]) -> list[Kept]:
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [make(**{**row, "code": tuple(row["code"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", "run the data stage again") from None


def input_files(recipe: Recipe) -> dict[str, Path]:
    """The files that this stage reads, for its key. Raises RecipeError or DataError where one cannot be read."""
    files = {}
    for key, name in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        try:
            files[key] = recipe.resolve(name)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown user's ~, a NUL
            raise RecipeError(f"data.{key} is {name!r}: {error}", "name one file") from None
        check_file(files[key])
    return files


def read_examples(path: Path, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Example], Notes]:
    """The training rows of a file, exact duplicates once, and what was tolerated; if strict, no unknown key is.

    Raises as rows.read_rows.
    """
    rows, notes = read_rows(path, ExampleRow, strict=strict, limits=limits)
    examples = [
        Example(row.instruction, row.response, row.category, row.topic, tuple(row.code), line) for line, row in rows
    ]
    kept, duplicates = _once(examples, [(each.instruction, each.response) for each in examples])
    return kept, replace(notes, duplicates=duplicates, conflicts=_conflicts(kept))


def read_prompts(path: Path, *, strict: bool = False, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Prompt], Notes]:
    """The evaluation rows of a file, each question once, and what was tolerated. Raises as rows.read_rows."""
    rows, notes = read_rows(path, PromptRow, strict=strict, limits=limits)
    prompts = []
    for line, row in rows:
        expect = row.expect.model_dump(exclude_unset=True)
        prompts.append(Prompt(row.instruction, row.category, row.topic, tuple(row.code), expect, row.response, line))
    kept, duplicates = _once(prompts, [each.instruction for each in prompts])
    return kept, replace(notes, duplicates=duplicates)


def _once(rows: Iterable[Kept], keys: Iterable[Hashable]) -> tuple[list[Kept], tuple[tuple[int, int], ...]]:
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
    groups = _by_question(examples).values()
    return tuple(tuple(each.line for each in group) for group in groups if len({each.response for each in group}) > 1)


def _by_question(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples that ask the same, in the order of the first of each."""
    groups: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[normalise(example.instruction)].append(example)
    return groups


def without_leaks(
    examples: Iterable[Example], prompts: Iterable[Prompt]
) -> tuple[list[Example], list[tuple[int, int]]]:
    """The examples that no prompt asks, and (line, prompt's line) of those left out."""
    asked = {normalise(prompt.instruction): prompt.line for prompt in prompts}
    found = [(example, asked.get(normalise(example.instruction))) for example in examples]
    leaks = [(example.line, line) for example, line in found if line is not None]
    return [example for example, line in found if line is None], leaks


def normalise(text: str) -> str:
    """A text as duplicates and leaks are looked for: without case, accents, punctuation and kinds of blanks.

    Between backticks punctuation stays: in `a?.b` and `a!.b` it is the meaning. Never empty unless the text is blank.
    """
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    parts = folded.split("`")
    parts[::2] = [_PROSE_MARKS.sub(" ", _BEYOND_ASCII.sub(_fold, part)) for part in parts[::2]]
    parts[1::2] = [_ACCENTS.sub("", part) for part in parts[1::2]]
    return " ".join(" ".join(parts).split()) or " ".join(folded.split())


def _fold(sign: re.Match[str]) -> str:
    """Nothing for an accent or an invisible mark, a blank for punctuation and symbols, else the sign itself."""
    category = unicodedata.category(sign[0])
    if category == "Cf" or _ACCENTS.match(sign[0]):
        return ""
    return " " if category[0] in "PSZC" else sign[0]


def sample(examples: Sequence[Kept], rows: int, seed: int) -> list[Kept]:
    """So many rows in proportion by category and topic, in the file's order; all for 0 or more than there are."""
    if not rows or rows >= len(examples):
        return list(examples)
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        groups[example.category, example.topic].append(place)
    quota = _spread(rows, {key: len(group) for key, group in groups.items()})
    chosen: set[int] = set()
    for key, group in groups.items():
        group.sort(key=lambda place: _rank(seed, f"{examples[place].instruction}\0{examples[place].line}"))
        chosen.update(group[: quota[key]])
    return [example for place, example in enumerate(examples) if place in chosen]


def _spread(total: int, sizes: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """`total` shared out in proportion, so that each cell and each category has its share within one row.

    Every so manyth row is taken along the cells in order (systematic sampling). Topics begin one further in each
    category: the same step would otherwise meet the same topics everywhere.
    """
    topics = sorted({topic for _, topic in sizes})
    order = [
        (category, topic)
        for number, category in enumerate(sorted({category for category, _ in sizes}))
        for topic in (*topics[number % len(topics) :], *topics[: number % len(topics)])
        if (category, topic) in sizes
    ]
    ends = [0, *itertools.accumulate(sizes[cell] for cell in order)]
    taken = [(2 * total * end + ends[-1]) // (2 * ends[-1]) for end in ends]
    return {cell: taken[place + 1] - taken[place] for place, cell in enumerate(order)}


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and about `share` of all held out from each category, both in the file's order.

    Rows that ask the same stay together; a category with two questions or more is on both sides. The same rows and
    seed give the same split, in whatever order they come. Raises DataError for fewer than two questions.
    """
    questions = _by_question(examples)
    if len(questions) < 2:
        found = f"{len(examples)} rows with {len(questions)} different questions"
        raise DataError(f"{found} cannot be split", "at least 2 are needed, one to train on and one held out")
    category = {question: min(each.category for each in group) for question, group in questions.items()}
    many = {name for name, count in Counter(category.values()).items() if count > 1}
    strata: defaultdict[str | None, list[str]] = defaultdict(list)
    for question, name in category.items():
        # A category of one question cannot be on both sides: such questions share one stratum
        strata[name if name in many else None].append(question)
    rows = {question: len(group) for question, group in questions.items()}
    sizes = {stratum: sum(rows[question] for question in members) for stratum, members in strata.items()}
    least = {stratum: int(stratum is not None) for stratum in strata}
    quota = _apportion(max(1, round(share * len(examples))), sizes, least)
    chosen: set[str] = set()
    for stratum, members in strata.items():
        members.sort(key=lambda question: _rank(seed, question))
        chosen.update(_fill(members, rows, quota[stratum]))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[normalise(example.instruction) in chosen].append(example)
    return sides


def _fill(members: Sequence[str], sizes: Mapping[str, int], room: int) -> list[str]:
    """Members in order as far as they fit into `room` rows: at least one where there is room, never all of them."""
    if not room or len(members) < 2:
        return []
    chosen: list[str] = []
    for member in members:
        if sizes[member] <= room and len(chosen) < len(members) - 1:
            chosen.append(member)
            room -= sizes[member]
    return chosen or [min(members, key=lambda member: sizes[member])]


def _apportion(total: int, sizes: Mapping[Key, int], least: Mapping[Key, int]) -> dict[Key, int]:
    """`total` shared out in proportion to `sizes` by largest remainder, yet at least `least` to each."""
    whole = sum(sizes.values())
    given = {key: max(least.get(key, 0), total * size // whole) for key, size in sizes.items()}
    over = {key: total * size - given[key] * whole for key, size in sizes.items()}
    rest = max(0, total - sum(given.values()))
    for key in sorted(sizes, key=lambda key: (-over[key], str(key)))[:rest]:
        given[key] += 1
    return given


def _rank(seed: int, text: str) -> bytes:
    """A text's place in a shuffled order that depends on nothing but the seed and the text."""
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()


def statistics(examples: Sequence[Example]) -> dict[str, Any]:
    """Counts by category, topic and both, lengths in characters, fenced blocks by language; as JSON holds them."""
    blocks = [fence_languages(each.instruction) + fence_languages(each.response) for each in examples]
    both: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        both[example.category][example.topic] += 1
    questions = _by_question(examples)
    return {
        "rows": len(examples),
        "questions": len(questions),
        "repeated_questions": sum(len(group) > 1 for group in questions.values()),
        "categories": _counts(each.category for each in examples),
        "topics": _counts(each.topic for each in examples),
        "categories_and_topics": {category: _counts(both[category].elements()) for category in sorted(both)},
        "instruction_characters": _lengths([len(each.instruction) for each in examples]),
        "response_characters": _lengths([len(each.response) for each in examples]),
        "fenced_blocks": _counts(language for languages in blocks for language in languages),
        "rows_without_block": sum(not languages for languages in blocks),
    }


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _lengths(values: list[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    return {
        "min": ordered[0],
        "median": figures.median_low(ordered),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],  # nearest rank
        "max": ordered[-1],
    }
