"""What a run made, for people: losses, sizes, speed, verdicts and a few answers side by side. Reads manifests only."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutor import artifacts
from tutor.pipeline import BY_NAME
from tutor.recipe import Recipe
from tutor.stages.parity_gate import lines as parity_lines
from tutor.template import shown

EXAMPLES = 3
"""How many answers are shown side by side."""


def collect(recipe: Recipe, build: Path) -> dict[str, Any]:
    """The results of the stages that are there, by stage, and three prompts with their answers."""
    folder = build / recipe.name
    results: dict[str, Any] = {}
    for stage in BY_NAME.values():
        manifest = artifacts.read_manifest(folder / stage.folder)
        if manifest is not None:
            results[stage.name] = {"seconds": manifest.seconds, **manifest.results}
    answers = folder / BY_NAME["evaluate"].folder / "answers.json"
    examples = json.loads(answers.read_text("utf-8")) if answers.is_file() else []
    return {"recipe": str(recipe.path), "stages": results, "examples": _spread(examples, EXAMPLES)}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, so that they come from different categories."""
    return [items[index * len(items) // count] for index in range(min(count, len(items)))]


def lines(summary: Mapping[str, Any], recipe: str) -> list[str]:
    """The summary as a terminal shows it."""
    stages = summary["stages"]
    parts: list[str] = []
    if "train" in stages:
        parts += _training(stages["train"])
    if "convert" in stages:
        parts += _files(stages["convert"], stages.get("evaluate", {}).get("perplexity", {}))
    if "parity" in stages:
        parts += ["", *parity_lines(stages["parity"]["hand_overs"])]
    if "evaluate" in stages:
        parts += verdict_lines(stages["evaluate"])
    for example in summary["examples"]:
        parts += _example(example)
    if "convert" in stages:
        parts += ["", f"Next: make chat, or: tutor ask -r {_short(recipe)} '¿Qué es una interfaz?'"]
    return parts


def _short(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def _training(train: Mapping[str, Any]) -> list[str]:
    held = train["held_out"]
    return [
        "",
        f"Trained on {train['rows']} rows in {train['seconds']:.0f} s ({train['samples_per_second']:.2f} samples/s, "
        f"{train['quantization']}, {train['precision']}); {held['rows']} rows held out",
        f"  {'':<22}{'before':>9}{'after':>9}",
        f"  {'held-out loss':<22}{held['loss_before']:>9.3f}{held['loss_after']:>9.3f}",
        f"  {'held-out perplexity':<22}{held['perplexity_before']:>9.2f}{held['perplexity_after']:>9.2f}",
    ]


def _files(convert: Mapping[str, Any], perplexities: Mapping[str, Any]) -> list[str]:
    rows = ["", f"  {'file':<22}{'size':>11}{'held-out perplexity':>22}"]
    for name, entry in sorted(convert["files"].items(), key=lambda item: -item[1]["size"]):
        scored = perplexities.get(name.removesuffix(".gguf"), {}).get("perplexity")
        rows.append(f"  {name:<22}{entry['size'] / 1e6:>8.1f} MB{'' if scored is None else f'{scored:>22.2f}'}")
    return rows


def verdict_lines(evaluate: Mapping[str, Any]) -> list[str]:
    """Verdict shares and speed, a column a model."""
    models = evaluate["models"]
    number = next(iter(models.values()))["all"]["n"]
    rows = ["", f"  {f'{number} held-out prompts':<22}" + "".join(f"{name:>12}" for name in models)]
    for label, verdict in (
        ("in Spanish", "spanish"),
        ("stopped by itself", "stopped"),
        ("with code", "code_block"),
        ("without a loop", "no_loop"),
        ("code compiles", "compiles"),
        ("as expected", "expected"),
    ):
        if all(verdict in model["all"] for model in models.values()):
            shares = "".join(f"{100 * model['all'][verdict]['share']:>10.0f} %" for model in models.values())
            rows.append(f"  {label:<22}{shares}")
    speeds = "".join(f"{model['tokens_per_second'] or 0:>12.0f}" for model in models.values())
    return [*rows, f"  {'tokens per second':<22}{speeds}"]


def _example(example: Mapping[str, Any]) -> list[str]:
    parts = ["", f"» {example['instruction']}"]
    for name, answer in example["answers"].items():
        text = shown(answer.get("text", f"({answer.get('error')})")).partition("\n\n")[0]
        end = "" if answer.get("finish") == "stop" else f" […cut at {answer.get('tokens', 0)} tokens]"
        parts += textwrap.wrap(f"{name}: {text[:300]}{end}", 100, initial_indent="  ", subsequent_indent="    ")
    return parts
