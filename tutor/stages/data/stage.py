"""The data stage: check a user's rows, and split them into training rows, held-out rows and prompts.

In: the recipe's JSONL file of rows, and perhaps one of prompts. Out: train and held-out rows that share no question,
prompts, statistics. Checks every row before it uses any (rows.py). Does not tokenize: the train stage checks whether a
row fits.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import median_low
from typing import Any

from tutor.errors import DataError
from tutor.formats.markdown import fence_languages
from tutor.formats.rows.examples import Example, Prompt
from tutor.formats.rows.recipe_files import data_files
from tutor.formats.rows.rows import Notes
from tutor.formats.rows.split_files import HELD_OUT, PROMPTS, STATISTICS, TRAIN
from tutor.recipe.settings import Recipe
from tutor.stages.data.held_out_prompts import prompts_of_rows
from tutor.stages.data.reading import read_examples, read_prompts, row_limits
from tutor.stages.data.splitting import group_by_question, sample, split, without_leaks

log = logging.getLogger(__name__)

FEW_PROMPTS = 6
"""Minimum number of prompts for an interval of the overlap with their references."""


def run(recipe: Recipe, inputs: Mapping[str, Path], out: Path, *, strict: bool = False) -> dict[str, Any]:
    """Read, check, split and write the recipe's rows into `out`; return a summary.

    `strict`: unknown keys and leaks are errors.

    Raises RecipeError (no such file), DataError (rows that are not usable, or too few), ArtifactError (input changed).
    """
    del inputs
    files = data_files(recipe)
    limits = row_limits(recipe)
    examples, notes = read_examples(files["train"], strict=strict, limits=limits)
    prompts, prompt_notes = list[Prompt](), None
    if "eval" in files:
        prompts, prompt_notes = read_prompts(files["eval"], strict=strict, limits=limits)
    _refuse_untrained_reasoning(recipe, examples, files["train"])
    clean, leaks = without_leaks(examples, prompts)
    if leaks and (strict or not clean):
        raise DataError(
            f"{files['train']}: {len(leaks)} of {len(examples)} rows repeat a question of {files['eval']}",
            "delete them from one of the two",
            tuple(f"{files['train']}:{line}: also {files['eval']}:{other}" for line, other in leaks[:20]),
        )
    chosen = sample(clean, recipe.data.rows, recipe.seed)
    train, held_out = split(chosen, recipe.data.held_out, recipe.seed)
    asked = sample(prompts or prompts_of_rows(held_out), recipe.data.prompts, recipe.seed)
    report = {
        "train": row_statistics(train),
        "held_out": row_statistics(held_out),
        "removed_from_train": [{"line": line, "eval_line": other} for line, other in leaks],
        "notes": {"train": notes.as_dict(), **({"eval": prompt_notes.as_dict()} if prompt_notes else {})},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in ((TRAIN, train), (HELD_OUT, held_out), (PROMPTS, asked)):
        _write(out / name, (json.dumps(asdict(row), ensure_ascii=False) for row in rows))
    _write(out / STATISTICS, [json.dumps(report, ensure_ascii=False, indent=1)])
    remarks = [
        *notes.warnings(),
        *(
            _prompt_notes(examples, prompts, notes, prompt_notes, len(leaks))
            if prompt_notes
            else _few_prompts(len(asked))
        ),
    ]
    for note in remarks:
        log.info("%s", note)
    return {
        "rows": notes.rows,
        "train": len(train),
        "held_out": len(held_out),
        "prompts": len(asked),
        "notes": remarks,
    }


def _prompt_notes(
    examples: Sequence[Example], prompts: Sequence[Prompt], notes: Notes, prompt_notes: Notes, leaks: int
) -> list[str]:
    """What a user should know of a file of prompts: what was tolerated, leaks, and whether it has another subject."""
    found = prompt_notes.warnings()
    if leaks:
        found.append(f"{notes.file}: {leaks} rows removed, for {prompt_notes.file} asks them too")
    labels = {(each.category, each.topic) for each in prompts} - {("", "")}
    if labels and labels.isdisjoint((each.category, each.topic) for each in examples):
        found.append(
            f"{prompt_notes.file}: no row of {notes.file} has the category and topic of a prompt; if the prompts are "
            "about another subject, leave data.eval out of the recipe: held-out rows are asked then"
        )
    return found


def _few_prompts(number: int) -> list[str]:
    if number >= FEW_PROMPTS:
        return []
    return [
        f"{number} held-out questions are too few for an interval ({FEW_PROMPTS}): raise data.held_out, or add rows"
    ]


def _refuse_untrained_reasoning(recipe: Recipe, examples: Sequence[Example], file: Path) -> None:
    """Raise DataError for rows with reasoning where the recipe trains none."""
    held = [each for each in examples if each.reasoning or any("reasoning" in message for message in each.history)]
    if held and recipe.reasoning != "rows":
        raise DataError(
            f"{file}: {len(held)} of {len(examples)} rows have reasoning, and the recipe's reasoning is "
            f"{recipe.reasoning!r}",
            'set prompt = "base" and reasoning = "rows", or remove it from the rows',
            tuple(f"{file}:{each.line}: has reasoning" for each in held[:20]),
        )


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(text + "\n" for text in texts)


def row_statistics(examples: Sequence[Example]) -> dict[str, Any]:
    """Count rows by category, topic and both, turns, characters, fenced blocks by language; as JSON values."""
    texts = [_texts(each) for each in examples]
    blocks = [list(chain.from_iterable(map(fence_languages, asked + answered))) for asked, answered in texts]
    turns = [len(answered) for _, answered in texts]
    both: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        both[example.category][example.topic] += 1
    questions = group_by_question(examples)
    return {
        "rows": len(examples),
        "questions": len(questions),
        "repeated_questions": sum(len(group) > 1 for group in questions.values()),
        "categories": _counts(each.category for each in examples),
        "topics": _counts(each.topic for each in examples),
        "categories_and_topics": {category: _counts(both[category].elements()) for category in sorted(both)},
        "rows_of_several_turns": sum(count > 1 for count in turns),
        "most_turns": max(turns, default=0),
        "answers": sum(turns),
        "rows_with_reasoning": sum(bool(each.reasoning) for each in examples),
        "instruction_characters": _lengths([sum(map(len, asked)) for asked, _ in texts]),
        "response_characters": _lengths([sum(map(len, answered)) for _, answered in texts]),
        "fenced_blocks": _counts(language for languages in blocks for language in languages),
        "rows_without_block": sum(not languages for languages in blocks),
    }


def _texts(example: Example) -> tuple[list[str], list[str]]:
    """Questions and answers of all turns."""
    earlier: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for message in example.history:
        earlier[message["role"]].append(message["content"])
    return [*earlier["user"], example.instruction], [*earlier["assistant"], example.response]


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _lengths(values: list[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    return {
        "min": ordered[0],
        "median": median_low(ordered),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],  # nearest rank
        "max": ordered[-1],
    }
