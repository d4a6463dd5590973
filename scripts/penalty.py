"""Measure the repetition penalty of the served sampler: the same model, prompts and greedy decoding, several penalties.

    .venv/bin/python scripts/penalty.py build/demo/gguf/tutor-Q8_0.gguf WORK [--recipe data/demo.toml] [--prompts 40]

Asks the corrections of data.eval (a correction repeats the names of the given code, which a penalty punishes) and a
sample of its other prompts, with llama-server, and grades the answers as `tutor eval` does. Answers are kept in WORK:
a killed run continues. Prints rates, and differences from a penalty of 1.0, paired by prompt, with 95 % intervals.
Needs the recipe's prompt format to be "tutor". Changes no recipe.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tutor.artifacts.hashing import file_sha256
from tutor.cli.progress import quiet_libraries
from tutor.engines.llamacpp.server import LlamaServer, serve
from tutor.engines.protocol import Generation
from tutor.formats.rows.split_files import PROMPTS, TRAIN, read_split
from tutor.graders.intervals import conclude, paired_verdicts
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.stages.data import stage as data_stage
from tutor.stages.evaluate import stage as evaluate
from tutor.stages.evaluate.answers import Task, answer_prompts

PENALTIES = (1.0, 1.05, 1.15)
CORRECTION = "correccion"
Record = Mapping[str, Any]

MEASURES: dict[str, Callable[[Record], bool | None]] = {
    "stopped by itself": lambda record: record["verdicts"]["stopped"],
    "without a loop": lambda record: record["verdicts"]["no_loop"],
    "in the language": lambda record: record["verdicts"]["language"],
    "code compiles": lambda record: record["verdicts"].get("compiles"),
    "names kept": lambda record: not record["code"]["dropped"] if record["corrects"] else None,
    "all that was asked": lambda record: record["passed"],
}
"""What is counted; None: nothing to count in this answer."""


def chosen(prompts: Sequence[Record], count: int) -> list[Record]:
    """Return the corrections, at most `count`, and prompts of the other categories in turn until there are `count`."""
    corrections = [prompt for prompt in prompts if prompt["category"] == CORRECTION]
    others: dict[str, list[Record]] = {}
    for prompt in prompts:
        if prompt["category"] != CORRECTION:
            others.setdefault(prompt["category"], []).append(prompt)
    in_turn = [each for group in itertools.zip_longest(*others.values()) for each in group if each is not None]
    return [*corrections, *in_turn][:count]


def answered(recipe: Recipe, options: argparse.Namespace, penalty: float, prompts: Sequence[Record]) -> list[Record]:
    """Return the graded answers with one penalty."""
    numbers = itertools.count(1)

    def start() -> AbstractContextManager[LlamaServer]:
        log = options.work / f"server-{penalty:g}-{next(numbers)}.log"
        return serve(options.gguf, context=recipe.generate.context, threads=options.threads, log=log)

    task = Task(
        f"penalty {penalty:g}",
        Generation(options.tokens, 0.0, 1.0, penalty, recipe.seed),
        recipe.system,
        options.work / f"penalty-{penalty:g}.jsonl",
        {"model": file_sha256(options.gguf), "context": recipe.generate.context},
    )
    answers = answer_prompts(start, prompts, task)
    training = read_split(options.work / "data", TRAIN)
    records = evaluate.graded(prompts, answers, training, language=recipe.data.language, kind="tutor")
    return [
        {**record, "corrects": prompt["category"] == CORRECTION}
        for record, prompt in zip(records, prompts, strict=True)
    ]


def table(records: Mapping[float, Sequence[Record]], seed: int) -> str:
    """Return rates by penalty and the differences from the first, as Markdown."""
    first, *rest = records
    lines = [
        f"| | {' | '.join(f'{penalty:g}' for penalty in records)} | {' | '.join(f'{first:g} to {p:g}' for p in rest)} |"
    ]
    lines.append("| --- |" + " ---: |" * (2 * len(records) - 1))
    for name, measure in MEASURES.items():
        values = {penalty: [measure(record) for record in found] for penalty, found in records.items()}
        counted = [place for place, value in enumerate(values[first]) if value is not None]
        passed = {penalty: [bool(found[place]) for place in counted] for penalty, found in values.items()}
        cells = [f"{sum(found)}/{len(found)}" for found in passed.values()]
        for penalty in rest:
            change = paired_verdicts(passed[first], passed[penalty], seed)
            low, high = (round(100 * (bound or 0.0)) for bound in (change.low, change.high))
            cells.append(f"{100 * change.mean:+.0f} points, {low:+d} to {high:+d}: {conclude(change)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Answer with every penalty, print the table."""
    parser = argparse.ArgumentParser(description="Measure repetition penalties on held-out prompts.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("work", type=Path, help="folder of the answers")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent.parent / "data" / "demo.toml")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=515, help="maximum number of tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("tutor").setLevel(logging.INFO)
    recipe = read_recipe(options.recipe)
    (options.work / "data").mkdir(parents=True, exist_ok=True)
    every = recipe.data.model_copy(update={"prompts": 0})
    data_stage.run(recipe.model_copy(update={"data": every}), {}, options.work / "data")
    prompts = chosen(read_split(options.work / "data", PROMPTS), options.prompts)
    print(table({penalty: answered(recipe, options, penalty, prompts) for penalty in PENALTIES}, recipe.seed))


if __name__ == "__main__":
    main()
