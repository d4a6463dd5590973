"""The report stage: all that the others found out, as one page for people, and a model card for the hub.

In: the folders of the stages, and what publishing and `tutor parity --host` recorded, as far as they are there. Out:
report.html (opens anywhere: no script, no network) and README.md, the card to put beside the GGUF files. Judges nothing
itself; what has not run is said in the page and is no error.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.manifest import read_manifest
from tutor.errors import ArtifactError
from tutor.formats.html import render
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.formats.rows.split_files import read_rows
from tutor.graders.verdict import in_spanish
from tutor.machine import host
from tutor.stages.report.labels import chosen, marked
from tutor.stages.report.model_card import card
from tutor.stages.report.prompts import prompts
from tutor.stages.report.view import Made, view

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("page.html.j2")
PAGE, CARD = "report.html", "README.md"


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the page and the card into `out`; their names, the page's bytes, what they lack.

    `inputs` are folders by name, and need not be there. Raises ArtifactError for a file that is damaged.
    """
    made = gather(recipe.name, recipe.ollama.model, recipe.system, inputs)
    values = view(made)
    text = page(made, values)
    (out / PAGE).write_text(text, "utf-8")
    (out / CARD).write_text(card(made), "utf-8")
    lacks = [each["what"] for each in values["missing"]]
    log.info("%s has %.1f kB%s", PAGE, len(text.encode()) / 1e3, f"; it lacks {', '.join(lacks)}" if lacks else "")
    return {"page": PAGE, "card": CARD, "bytes": len(text.encode()), "prompts": len(made.answers), "missing": lacks}


def page(made: Made, values: Mapping[str, Any] | None = None) -> str:
    """The page's text; the same bytes from the same values."""
    listed = {"prompts": prompts(made.answers), "reworded": prompts(made.paraphrased)}
    return render(TEMPLATE, **(values or view(made)), **listed).lstrip()


def gather(name: str, model: str, system: str, inputs: Mapping[str, Path]) -> Made:
    """What the folders hold."""
    manifests = {folder: manifest for folder, path in inputs.items() if (manifest := read_manifest(path)) is not None}
    evaluated = inputs["eval" if "eval" in manifests else "eval-ollama"]
    answers = _json(evaluated / "answers.json", "tutor eval")
    labels, no_labels = _labels(inputs, manifests, system)
    return Made(
        name=name,
        model=model,
        manifests=manifests,
        metrics=read_rows(inputs["adapter"] / "metrics.jsonl") if "adapter" in manifests else [],
        answers=answers,
        published=_published(inputs["model/published.json"]),
        paraphrased=_json(evaluated / "paraphrased.json", "tutor eval"),
        labels=labels,
        no_labels=no_labels,
        language="es" if answers and in_spanish(answers) else "",
        machine=_machine(),
    )


def _published(path: Path) -> dict[str, Any]:
    """The hand-off to Ollama, as the last publishing recorded it; empty where nothing was published."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    record = value.get("parity") if isinstance(value, dict) else None
    return {"hand_offs": [record]} if isinstance(record, dict) else {}


def _json(path: Path, command: str) -> list[dict[str, Any]]:
    """A list of a folder that may not be there."""
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
    inputs: Mapping[str, Path], manifests: Mapping[str, Any], system: str
) -> tuple[Sequence[dict[str, Any]], str]:
    """Some rows, token by token; or why there are none."""
    if "base" not in manifests or "data" not in manifests:
        return [], "No row can be shown as tokens before the base is there: tutor base."
    if find_spec("transformers") is None:
        return [], "No row is shown as tokens: transformers, whose tokenizer training uses, is not installed here."
    rows = chosen(read_rows(inputs["data"] / "train.jsonl"))
    try:
        tokenizer = load_tokenizer(read_facts(inputs["base"])[1])
    except ArtifactError as error:  # the hub's cache may have been emptied since
        return [], f"No row can be shown as tokens: {error.message}."
    return [marked(tokenizer, row, system) for row in rows], ""


def _machine() -> list[tuple[str, str]]:
    """Where the page was written; each stage's own host stands in its manifest."""
    processor, memory = host.processor(), host.memory()
    cores = f"{processor.cores} core{'' if processor.cores == 1 else 's'}"
    found = [("this page written on", f"{processor.name}, {cores}")]
    if memory:
        found.append(("memory", f"{memory.total / 1e9:.1f} GB"))
    return found + [("GPU", f"{gpu.name}, {gpu.total / 1e9:.1f} GB") for gpu in host.gpus()]
