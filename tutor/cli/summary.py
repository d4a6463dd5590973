"""Terminal tables of results: losses, file sizes, the quantization benchmark, rates, and a few answers side by side.

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

from tutor.artifacts.layout import BASELINES, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.manifest import find_manifest
from tutor.cli.model_lines import file_lines, ladder_lines, training_lines
from tutor.graders.labels import (
    LABELS,
    OTHER_REFERENCE_LABEL,
    REFERENCE_LABEL,
    REFERENCE_LIMITS,
    limits,
    verdict_labels,
)
from tutor.pipeline.recipe_folder import refuse_folder
from tutor.prompt.messages import display_text, row_questions
from tutor.recipe.settings import Recipe
from tutor.stages.parity.gate import parity_table
from tutor.stages.report.baselines import baseline_lines, current
from tutor.stages.report.tables import drift_rows

EXAMPLES = 3
"""Number of prompts whose answers are printed side by side."""
TABLE_VERDICTS = ("passed", "language", "stopped", "code_block", "no_loop", "compiles", "expected")
"""Verdicts of the terminal table; the results and the report have all of them."""


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
    return {"recipe": str(recipe.path), "stages": results, **more, "examples": _spread(examples, EXAMPLES)}


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
        parts += ["", *parity_table(stages["parity"]["hand_offs"])]
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


def verdict_lines(evaluate: Mapping[str, Any]) -> list[str]:
    """Return one row a verdict and one column a model: rates with counts, median speed, kinds of question, findings."""
    models = evaluate["models"]
    number = next(iter(models.values()))["all"]["n"]
    width, labels = max(18, *(len(name) + 2 for name in models)), verdict_labels(evaluate.get("language"))
    rows = ["", f"  {f'{number} held-out prompts':<22}" + "".join(f"{name:>{width}}" for name in models)]
    for verdict in TABLE_VERDICTS:
        if all(verdict in model["all"] for model in models.values()):
            shares = "".join(f"{_share(model['all'][verdict], number):>{width}}" for model in models.values())
            rows.append(f"  {labels[verdict]:<22}{shares}")
    speeds = "".join(f"{model['tokens_per_second'] or 0:>{width}.0f}" for model in models.values())
    rows.append(f"  {'tokens per second':<22}{speeds}")
    rows += _references(list(models.values()), width)
    rows += [line for text in limits(models) for line in _wrapped(text)]
    rows += _kinds(evaluate, width)
    findings = [f"  {_finding(found)}" for found in evaluate.get("findings", ())]
    return [*rows, *([""] if findings else []), *findings]


def _references(models: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Return the overlap with the reference answers, one column a model."""
    found = [model.get("reference") for model in models]
    if not all(found):
        return []
    own = "".join(f"{_mean(each):>{width}}" for each in found if each)
    rows = [f"  {REFERENCE_LABEL:<22}{own}"]
    controls = [each["control"] for each in found if each and each["control"]]
    if controls:
        rows.append(f"  {OTHER_REFERENCE_LABEL:<22}" + "".join(f"{each['before']:>{width}.1f}" for each in controls))
    return rows


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ")


def _mean(overlap: Mapping[str, Any]) -> str:
    interval = "" if overlap["low"] is None else f" [{overlap['low']:.0f}, {overlap['high']:.0f}]"
    return f"{overlap['mean']:.1f}{interval}"


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


def _kinds(evaluate: Mapping[str, Any], width: int) -> list[str]:
    """Return the rates by kind of question: with their changes from the first model, or plain without a comparison."""
    rows: list[str] = []
    for change in evaluate.get("differences", ()):
        sides = f"{change['before']:>18}{change['after']:>18}"
        rows += [
            "",
            f"  {LABELS['passed']:<22}{sides}   change, in points (95 %)",
            _change("all", change["all"]["passed"]),
        ]
        rows += [_change(name or "(no kind)", entry) for name, entry in change["categories"].items()]
        rows += _reference_change(change)
    if rows:
        return rows
    models = evaluate["models"].values()
    kinds = next(iter(models)).get("categories", {})
    for kind in kinds if len(kinds) > 1 else ():
        asked = [model["categories"][kind] for model in models]
        shares = "".join(f"{_share(rate['passed'], rate['n']):>{width}}" for rate in asked)
        rows.append(f"  {kind or '(no kind)':<22}{shares}")
    return ["", f"  {LABELS['passed']}, by kind of question", *rows] if rows else []


def _share(rate: Mapping[str, Any], number: int) -> str:
    return f"{100 * rate['share']:.0f} % ({rate['n']}/{number})"


def _finding(found: Mapping[str, str]) -> str:
    return f"WORSE: {found['text']}" if found["conclusion"] == "worse" else found["text"]


def comparison_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what changed between two models: every verdict, every kind of question, and the prompts that changed."""
    left_out = sum(result["left_out"].values())
    note = f"; {left_out} answered by only one are left out" if left_out else ""
    number, labels = result["n"], verdict_labels(result.get("language"))
    rows = [
        f"A: {result['before']}",
        f"B: {result['after']}",
        f"{number} prompts answered by both{note}",
        "",
        f"  {'':<22}{'A':>18}{'B':>18}   B - A, in points (95 %)",
        *(_change(labels[name], entry) for name, entry in result["all"].items()),
        *_reference_change(result),
        *(_wrapped(REFERENCE_LIMITS) if result.get("reference") else ()),
    ]
    for verdict, kinds in result["kinds"].items() if len(result["categories"]) > 1 else ():
        rows += ["", f"  {labels[verdict]}, by kind of question"]
        rows += [_change(kind or "(no kind)", entry) for kind, entry in kinds.items()]
    for name in ("better", "worse"):
        if result[name]:
            rows += ["", f"  {name} in B: {len(result[name])} of {number}"]
            rows += [f"  » {textwrap.shorten(question, 96, placeholder=' …')}" for question in result[name]]
    return rows


def _change(label: str, entry: Mapping[str, Any]) -> str:
    shares = "".join(f"{_share(entry[side], entry['n']):>18}" for side in ("before", "after"))
    interval = "" if entry["low"] is None else f"[{100 * entry['low']:+.0f}, {100 * entry['high']:+.0f}]"
    return f"  {label:<22}{shares}   {100 * entry['difference']:+4.0f} {interval:<14}{entry['conclusion']}"


def _reference_change(change: Mapping[str, Any]) -> list[str]:
    """Return the change of the overlap with the reference answers as a row of _change; none without references."""
    entry = change.get("reference")
    if not entry:
        return []
    interval = "" if entry["low"] is None else f"[{entry['low']:+.1f}, {entry['high']:+.1f}]"
    sides = f"{entry['before']:>18.1f}{entry['after']:>18.1f}"
    return [f"  {REFERENCE_LABEL:<22}{sides}   {entry['difference']:+4.1f} {interval:<13} {entry['conclusion']}"]


def _example(example: Mapping[str, Any]) -> list[str]:
    turn = len(row_questions(example))
    parts = ["", f"» {f'(turn {turn}) ' if turn > 1 else ''}{example['instruction']}"]
    for name, answer in example["answers"].items():
        text = display_text(answer.get("text", f"({answer.get('error')})")).partition("\n\n")[0]
        if thought := answer.get("thought"):
            text = f"(thought of {len(thought.split())} words) {text or '(no answer)'}"
        end = "" if answer.get("finish") == "stop" else f" […cut at {answer.get('tokens', 0)} tokens]"
        parts += textwrap.wrap(f"{name}: {text[:300]}{end}", 100, initial_indent="  ", subsequent_indent="    ")
    return parts
