"""Results on a terminal: the tables of the stages that have run, and a few answers side by side.

In: the manifests of a build folder and the answers of its evaluation. Out: the results as JSON holds them, and as
lines. Runs no stage and computes no figure.
"""

import contextlib
import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json_object
from tutor.artifacts.layout import BASELINES, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.manifest import find_manifest
from tutor.cli.model_lines import file_lines, ladder_lines, training_lines
from tutor.cli.verdict_tables import verdict_lines
from tutor.pipeline.recipe_folder import refuse_folder
from tutor.prompt.messages import display_text, row_questions
from tutor.recipe.settings import Recipe
from tutor.stages.parity.gate import note_lines, parity_table
from tutor.stages.report.baselines import baseline_lines, current
from tutor.stages.report.tables import drift_rows

EXAMPLES = 3
"""Number of prompts whose answers are printed side by side."""


def collect(recipe: Recipe, build: Path) -> dict[str, Any]:
    """Collect the results of the stages that have run and of `tutor baselines`, and EXAMPLES prompts with answers."""
    refuse_folder(recipe, build)
    folder = BuildFolder(build, recipe.name)
    results: dict[str, Any] = {}
    for stage in STAGE_FOLDERS:
        manifest = find_manifest(folder.stage(stage))
        if manifest is not None:
            results[stage] = {"seconds": manifest.seconds, **manifest.results}
    answers = folder.stage("evaluate") / "answers.json"
    examples: list[Any] = []
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged: the run makes it again
        examples = list(json.loads(answers.read_text("utf-8")))
    compared = current(find_manifest(folder.path / BASELINES), find_manifest(folder.stage("convert")))
    more = {"baselines": compared} if compared else {}
    published = read_json_object(folder.published()) or {}
    unchecked = list(published.get("not_checked", ()))
    return {
        "recipe": str(recipe.path),
        "stages": results,
        "unchecked": unchecked,
        **more,
        "examples": _spread(examples, EXAMPLES),
    }


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return `count` items at even distances, so that they come from different categories."""
    return [items[index * len(items) // count] for index in range(min(count, len(items)))]


def summary_lines(summary: Mapping[str, Any], recipe: str) -> list[str]:
    """Return the collected results as lines for a terminal."""
    stages = summary["stages"]
    parts: list[str] = []
    if "train" in stages:
        parts += training_lines(stages["train"])
    if "convert" in stages:
        parts += file_lines(stages["convert"], stages.get("ladder", {}).get("perplexity", {}))
    if "ladder" in stages:
        parts += ladder_lines(stages["ladder"])
    if "parity" in stages:
        parts += ["", *parity_table(stages["parity"]["hand_offs"]), *note_lines(stages["parity"])]
        parts += [f"  NOT PROVEN, published unchecked: {line}" for line in summary.get("unchecked", ())]
    if "evaluate" in stages:
        parts += verdict_lines(stages["evaluate"])
    if general := stages.get("forgetting", {}).get("general"):
        parts += forgetting_lines(general)
    if "baselines" in summary:
        parts += baseline_lines(summary["baselines"])
    for example in summary["examples"]:
        parts += _example(example)
    return [*parts, *_next_steps(summary, recipe)]


def _next_steps(summary: Mapping[str, Any], recipe: str) -> list[str]:
    """Return the commands that show the page and ask the model."""
    parts: list[str] = []
    if "report" in summary["stages"]:
        parts += ["", f"Everything on one page: tutor report --open -r {_quoted(recipe)}"]
    if "convert" in summary["stages"]:
        question = shlex.quote(_short_question(summary["examples"]))
        parts += ["", f"Next: make chat, or: tutor ask -r {_quoted(recipe)} {question}"]
    return parts


def _short_question(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return a question of the evaluation that fits a command line, or a placeholder."""
    asked = [each["instruction"] for each in examples if not each.get("history")]
    return next((text for text in asked if len(text) <= 80 and "\n" not in text), "your question")


def report_lines(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Return the path of the report page, its size, and the stages that it lacks."""
    missing = [f"  not in the report, not run yet: {', '.join(results['missing'])}"] if results["missing"] else []
    size = f"  {results['bytes'] / 1e3:.0f} kB, {results['prompts']} prompts; model card: {folder / results['card']}"
    return [str(folder / results["page"]), size, *missing]


def _quoted(path: str) -> str:
    """Return the path for a command line: relative to the current folder, where it is below."""
    with contextlib.suppress(ValueError):
        path = str(Path(path).relative_to(Path.cwd()))
    return shlex.quote(path)


def forgetting_lines(general: Mapping[str, Any]) -> list[str]:
    """Return the perplexity of general texts, in all and by language and kind."""
    heads = ("texts", "before", "after", "change (95 %)")
    rows = [("general texts: perplexity", heads, "")]
    rows += [(row["label"], row["cells"], row["conclusion"]) for row in drift_rows(general)]
    widths = (6, 10, 10, 26)
    return [
        "",
        *(
            f"  {label:<26}{''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths, strict=True))}"
            f"   {conclusion}".rstrip()
            for label, cells, conclusion in rows
        ),
    ]


def _example(example: Mapping[str, Any]) -> list[str]:
    turn = len(row_questions(example))
    parts = ["", f"» {f'(turn {turn}) ' if turn > 1 else ''}{example['instruction']}"]
    for name, answer in example["answers"].items():
        text = display_text(answer.get("text", f"({answer.get('error')})")).partition("\n\n")[0]
        if thought := answer.get("thought"):
            text = f"(thought of {len(thought.split())} words) {text or '(no answer)'}"
        end = "" if answer.get("finish") != "length" else f" […cut at {answer.get('tokens', 0)} tokens]"
        parts += textwrap.wrap(f"{name}: {text[:300]}{end}", 100, initial_indent="  ", subsequent_indent="    ")
    return parts
