"""The report stage: the results of all stages as one page for people, and a model card for the hub.

In: the folders of the stages, and the records of publishing and of `tutor parity --host`, where they exist.
Out: report.html (no script, no network) and README.md, the card for the GGUF files. Grades nothing. The page lists each
stage that has not run; that is no error.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.layout import OLLAMA_EVALUATION, PUBLISHED_MERGED
from tutor.artifacts.manifest import find_manifest
from tutor.errors import ArtifactError
from tutor.formats.html import render_page
from tutor.formats.models.prompt_format import read_format
from tutor.formats.rows.row_ids import row_encoder
from tutor.formats.rows.split_files import STATISTICS, TRAIN, read_json_lines, read_split
from tutor.graders.verdict import are_in_language
from tutor.machine import host
from tutor.prompt.format import PromptFormat
from tutor.stages.report.labels import labelled_runs, sample_rows
from tutor.stages.report.model_card import card
from tutor.stages.report.prompts import prompts
from tutor.stages.report.view import EVALUATIONS, StageOutputs, view

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("page.html.j2")
PAGE = "report.html"
"""File of the page."""
LISTS = {"prompts": "answers", "paraphrased": "paraphrased"}
"""Lists of prompts on the page, and the outputs that hold them."""
CARD = "README.md"
"""File of the model card."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the page and the card into `out`; return their names, the page's size and the missing sections.

    `inputs`: folders by name, any of which may be missing. Raises ArtifactError for a damaged file.
    """
    outputs = gather(recipe, inputs)
    values = view(outputs)
    text = page(outputs, values)
    (out / PAGE).write_text(text, "utf-8")
    (out / CARD).write_text(card(outputs), "utf-8")
    lacks = [each["what"] for each in values["missing"]]
    log.info("%s has %.1f kB%s", PAGE, len(text.encode()) / 1e3, f"; it lacks {', '.join(lacks)}" if lacks else "")
    return {"page": PAGE, "card": CARD, "bytes": len(text.encode()), "prompts": len(outputs.answers), "missing": lacks}


def page(outputs: StageOutputs, values: Mapping[str, Any] | None = None) -> str:
    """Return the page's text; equal values give equal bytes."""
    language = (outputs.evaluated or {}).get("language", "")
    listed = {name: prompts(getattr(outputs, field), language) for name, field in LISTS.items()}
    return render_page(TEMPLATE, **(values or view(outputs)), **listed).lstrip()


def gather(recipe: "Recipe", inputs: Mapping[str, Path]) -> StageOutputs:
    """Read the outputs of the stages from their folders."""
    manifests = {folder: manifest for folder, path in inputs.items() if (manifest := find_manifest(path)) is not None}
    evaluated = inputs[next((name for name in EVALUATIONS if name in manifests), OLLAMA_EVALUATION)]
    answers = _json(evaluated / "answers.json", "tutor eval")
    labels, no_labels = _labels(recipe, inputs, manifests)
    return StageOutputs(
        name=recipe.name,
        model=recipe.ollama.model,
        manifests=manifests,
        metrics=read_json_lines(inputs["adapter"] / "metrics.jsonl", "tutor train") if "adapter" in manifests else [],
        answers=answers,
        published=_published(inputs[PUBLISHED_MERGED]),
        paraphrased=_json(evaluated / "paraphrased.json", "tutor eval"),
        labels=labels,
        no_labels=no_labels,
        language=recipe.data.language if answers and are_in_language(answers, recipe.data.language) else "",
        machine=_machine(),
        prompt=_format(recipe, inputs),
        statistics=_statistics(inputs["data"] / STATISTICS),
    )


def _format(recipe: "Recipe", inputs: Mapping[str, Path]) -> PromptFormat | None:
    """The prompt format; None before the base stage has read the base's template."""
    try:
        return read_format(recipe, inputs["base"])
    except ArtifactError:
        return None


def _statistics(path: Path) -> dict[str, Any]:
    """The counts of the data stage; empty where they are not there."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _published(path: Path) -> dict[str, Any]:
    """The hand-off to Ollama, as the last publishing recorded it; empty where no model was published."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict) or not isinstance(record := value.get("parity"), dict):
        return {}
    return {"hand_offs": [record], "not_checked": value.get("not_checked", [])}


def _json(path: Path, command: str) -> list[dict[str, Any]]:
    """A JSON file with a list; an empty list where the file is missing."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", f"run: {command}") from None
    if not isinstance(value, list):
        raise ArtifactError(f"{path} is no list", f"run: {command}")
    return value


def _labels(
    recipe: "Recipe", inputs: Mapping[str, Path], manifests: Mapping[str, Any]
) -> tuple[Sequence[dict[str, Any]], str]:
    """Some rows, token by token; or the reason why there are none."""
    if "base" not in manifests or "data" not in manifests:
        return [], "No row can be shown as tokens before the base stage has run: tutor base."
    if find_spec("transformers") is None:
        return [], "No row is shown as tokens: transformers, whose tokenizer training uses, is not installed here."
    rows = sample_rows(read_split(inputs["data"], TRAIN))
    try:
        encoder = row_encoder(recipe, inputs["base"])
    except ArtifactError as error:  # the hub's cache may have been emptied
        return [], f"No row can be shown as tokens: {error.message}."
    return [labels for row in rows for labels in labelled_runs(encoder, row)], ""


def _machine() -> list[tuple[str, str]]:
    """The machine that writes the page; each stage's host is in its manifest."""
    processor, memory = host.processor(), host.memory()
    cores = f"{processor.cores} core{'' if processor.cores == 1 else 's'}"
    found = [("this page written on", f"{processor.name}, {cores}")]
    if memory:
        found.append(("memory", f"{memory.total / 1e9:.1f} GB"))
    return found + [("GPU", f"{gpu.name}, {gpu.total / 1e9:.1f} GB") for gpu in host.gpus()]
