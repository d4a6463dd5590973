"""`tutor verify`: whether a GGUF, or what Ollama serves, is what this recipe's build folder made.

In: a file or a published model, the recipe, its build folder as far as it is there. Out: a row for each thing that is
said of the file, with what it comes to when computed again: ok, wrong, other (software, which may differ), or unknown
where nothing is there to compute it from. Changes nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tutor import artifacts
from tutor.chain import BY_NAME
from tutor.engines import ollama_api
from tutor.engines.gguf_file import Gguf, read_gguf
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.modelfolder import read_facts
from tutor.recipe import Recipe
from tutor.stages import lineage

Condition = Literal["ok", "wrong", "other", "unknown"]
BLOB = re.compile(r"^(?P<word>FROM|ADAPTER)\s.*sha256[-:](?P<digest>[0-9a-f]{64})", re.MULTILINE)
"""Where /api/show's Modelfile names the files behind a model."""
LORA = "lora"


@dataclass(frozen=True)
class Row:
    """One thing that is said, and what it comes to."""

    what: str
    condition: Condition
    said: str
    found: str  # or why it could not be found


def verify_file(path: Path, recipe: Recipe, build: Path) -> list[Row]:
    """The rows of a GGUF file. Raises ArtifactError where it is not whole, or says nothing of its origin."""
    gguf = read_gguf(path)
    said = lineage.lineage_of(gguf.fields)
    if not said:
        raise ArtifactError(f"{path} does not say where it comes from", "made by another program? tutor convert says")
    folder = build / recipe.name
    rows = _computed(said, recipe, folder)
    return [_known("file", artifacts.file_sha256(path), folder), _weights(path, gguf, said, folder), *rows]


def verify_model(model: str, host: str | None, recipe: Recipe, build: Path) -> list[Row]:
    """The rows of a model on an Ollama server: its files' digests, and what its GGUF says.

    Raises ServiceError without the server or the model, ArtifactError where it says nothing of its origin.
    """
    with ollama_api.connect(host) as server:
        shown = server.show(model)
        if shown is None:
            raise ServiceError(f"{server.host} has no model {model!r}", "see: tutor models")
    said = lineage.lineage_of(shown.get("model_info") or {})
    if not said:
        raise ArtifactError(f"{model} does not say where it comes from", "published by another program?")
    folder = build / recipe.name
    blobs = [(found["word"], found["digest"]) for found in BLOB.finditer(str(shown.get("modelfile") or ""))]
    files = [_known("adapter file" if word == "ADAPTER" else "file", digest, folder) for word, digest in blobs]
    if not files:
        files = [Row("file", "unknown", "", "the server does not name its file")]
    weights = Row("weights", "unknown", "", "the file is the server's")
    return [*files, weights, *_computed(said, recipe, folder)]


def is_file(name: str) -> bool:
    """Whether `tutor verify` takes a name for a file. Raises RecipeError for the path of a file that is not there."""
    path = Path(name)
    if path.is_file():
        return True
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith("."):
        raise RecipeError(f"{name} is no file", "give a GGUF file, or the name of a model in Ollama")
    return False


def _known(what: str, digest: str, folder: Path) -> Row:
    """Whether a file of this digest is among those that the stages noted when they made them."""
    made: dict[str, str] = {}
    for name in (BY_NAME["convert"].folder, LORA):
        with suppress(ArtifactError):  # a damaged manifest knows nothing
            manifest = artifacts.read_manifest(folder / name)
            outputs = manifest.outputs if manifest else {}
            made |= {entry["sha256"]: f"{name}/{file}" for file, entry in outputs.items() if file.endswith(".gguf")}
    if not made:
        return Row(what, "unknown", digest, f"{folder / BY_NAME['convert'].folder} has no manifest")
    if digest in made:
        return Row(what, "ok", digest, made[digest])
    return Row(what, "wrong", digest, f"none of the {len(made)} files that were made in {folder}")


def _weights(path: Path, gguf: Gguf, said: Mapping[str, str], folder: Path) -> Row:
    """Whether a file's tensors are the merged model's (or the base's): all numbers of F16, a sample of others."""
    kind = gguf.fields.get("general.file_type")
    try:
        model = folder / BY_NAME["merge"].folder if "merged.sha256" in said else _base_folder(folder)
        from tutor.engines.gguf_weights import weights_of
        from tutor.stages import readback

        weights = weights_of(model)
        if not weights:
            return Row("weights", "unknown", "", f"{model} is not there")
    except ArtifactError as error:
        return Row("weights", "unknown", "", error.message)
    try:
        if kind == 1:  # F16
            readback.exact(path, gguf, weights)
            return Row("weights", "ok", "", f"number for number those of {model}")
        figures = readback.measure(path, gguf, weights, None)
    except ArtifactError as error:
        return Row("weights", "wrong", "", error.message)
    return Row("weights", "ok", "", f"those of {model}, at most {100 * figures.error:.2g} % off in a sample")


def _computed(said: Mapping[str, str], recipe: Recipe, folder: Path) -> list[Row]:
    """A row for each key-value, computed again."""
    places: dict[str, Callable[[], str]] = {
        "data.sha256": lambda: artifacts.file_sha256(folder / BY_NAME["data"].folder / "train.jsonl"),
        "recipe.sha256": lambda: lineage.recipe_hash(recipe),
        "adapter.sha256": lambda: lineage.weights_hash(folder / BY_NAME["train"].folder),
        "merged.sha256": lambda: lineage.weights_hash(folder / BY_NAME["merge"].folder),
        "base": lambda: recipe.base.source,
        "base.sha256": lambda: lineage.weights_hash(_base_folder(folder)),
        **{name: partial(lineage.software().__getitem__, name) for name in lineage.SOFTWARE},
    }
    return [_row(name, value, places.get(name)) for name, value in said.items()]


def _row(name: str, said: str, compute: Callable[[], str] | None) -> Row:
    if compute is None:
        return Row(name, "unknown", said, "another version of tutor wrote it")
    try:
        found = compute()
    except ArtifactError as error:
        return Row(name, "unknown", said, error.message)
    if found == said:
        return Row(name, "ok", said, found)
    return Row(name, "other" if name in lineage.SOFTWARE else "wrong", said, found)


def _base_folder(folder: Path) -> Path:
    return read_facts(folder / BY_NAME["base"].folder)[1]


def wrong(rows: Sequence[Row]) -> list[Row]:
    """The rows that must not be."""
    return [row for row in rows if row.condition == "wrong"]


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a terminal: hashes by their beginning."""
    shown = []
    for row in rows:
        if row.condition == "ok":
            text = _brief(row.found) if row.found != row.said else _brief(row.said)
        elif row.condition == "unknown":
            text = f"{_brief(row.said)} cannot be checked: {row.found}".strip()
        else:
            text = f"{_brief(row.said)} (here: {_brief(row.found)})".strip()
        shown.append(f"{row.condition:<8} {row.what:<15} {text}")
    return shown


def _brief(text: str) -> str:
    return f"{text[:16]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a program."""
    return [{"what": row.what, "condition": row.condition, "said": row.said, "found": row.found} for row in rows]
