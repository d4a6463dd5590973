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
from typing import TYPE_CHECKING, Any, Literal

from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.layout import LORA, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.manifest import read_manifest
from tutor.engines.ollama.client import connect
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.model_folder import read_facts
from tutor.recipe.settings import Recipe
from tutor.stages.convert import lineage

if TYPE_CHECKING:
    from tutor.formats.models.gguf_weights import Weight

Condition = Literal["ok", "wrong", "other", "unknown"]
BLOB = re.compile(r"^(?P<word>FROM|ADAPTER)\s.*sha256[-:](?P<digest>[0-9a-f]{64})", re.MULTILINE)
"""Where /api/show's Modelfile names the files behind a model."""
ALL_F16 = 1
"""general.file_type of a file without any quantization."""


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
    folder = BuildFolder(build, recipe.name)
    known = _known("file", file_sha256(path), folder, _made(folder))
    return [known, _weights("weights", path, gguf, folder), *_computed(said, recipe, folder)]


def verify_model(model: str, host: str | None, recipe: Recipe, build: Path) -> list[Row]:
    """The rows of a model on an Ollama server: its files' digests, and what its GGUF says.

    A file of the build folder with the same digest is what the server has: its weights are compared in its place.
    Raises ServiceError without the server or the model, ArtifactError where it says nothing of its origin.
    """
    with connect(host) as server:
        shown = server.show(model)
        if shown is None:
            raise ServiceError(f"{server.host} has no model {model!r}", "see: tutor models")
    said = lineage.lineage_of(shown.get("model_info") or {})
    if not said:
        raise ArtifactError(f"{model} does not say where it comes from", "published by another program?")
    folder = BuildFolder(build, recipe.name)
    made, rows = _made(folder), []
    for found in BLOB.finditer(str(shown.get("modelfile") or "")):
        adapter, digest = "adapter " if found["word"] == "ADAPTER" else "", found["digest"]
        rows.append(_known(f"{adapter}file", digest, folder, made))
        try:
            here = _same_here(digest, folder, made)
            gguf = read_gguf(here)
            # Of two files a server tells what the base's says alone.
            said |= lineage.lineage_of(gguf.fields)
            rows.append(_weights(f"{adapter}weights", here, gguf, folder))
        except ArtifactError as error:
            rows.append(Row(f"{adapter}weights", "unknown", "", error.message))
    if not rows:
        rows = [Row("file", "unknown", "", "the server does not name its file")]
    return [*rows, *_computed(said, recipe, folder)]


def is_file(name: str) -> bool:
    """Whether `tutor verify` takes a name for a file. Raises RecipeError for the path of a file that is not there."""
    path = Path(name)
    if path.is_file():
        return True
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith("."):
        raise RecipeError(f"{name} is no file", "give a GGUF file, or the name of a model in Ollama")
    return False


def _made(folder: BuildFolder) -> dict[str, str]:
    """The GGUF files that the stages noted when they made them: digest -> name in the build folder."""
    made: dict[str, str] = {}
    for name in (STAGE_FOLDERS["convert"], LORA):
        with suppress(ArtifactError):  # a damaged manifest knows nothing
            manifest = read_manifest(folder.path / name)
            outputs = manifest.outputs if manifest else {}
            made |= {entry["sha256"]: f"{name}/{file}" for file, entry in outputs.items() if file.endswith(".gguf")}
    return made


def _same_here(digest: str, folder: BuildFolder, made: Mapping[str, str]) -> Path:
    """The file of the build folder with this digest. Raises ArtifactError where there is none."""
    if digest not in made:
        raise ArtifactError("the file is the server's, and none that was made here is the same")
    path = folder.path / made[digest]
    if not path.is_file() or file_sha256(path) != digest:
        raise ArtifactError(f"the file is the server's, and {path} is gone or changed")
    return path


def _known(what: str, digest: str, folder: BuildFolder, made: Mapping[str, str]) -> Row:
    """Whether a file of this digest is among those that were made here."""
    if not made:
        return Row(what, "unknown", digest, f"{folder.stage('convert')} has no manifest")
    if digest in made:
        return Row(what, "ok", digest, made[digest])
    return Row(what, "wrong", digest, f"none of the {len(made)} files that were made in {folder.path}")


def _weights(what: str, path: Path, gguf: Gguf, folder: BuildFolder) -> Row:
    """Whether a file's tensors are its model's: all numbers of F16, a sample of others."""
    from tutor.stages.convert import quantization_error as readback

    try:
        model, weights = _made_of(gguf, folder)
    except ArtifactError as error:
        return Row(what, "unknown", "", error.message)
    try:
        if gguf.fields.get("general.file_type") == ALL_F16:
            readback.exact(path, gguf, weights)
            return Row(what, "ok", "", f"number for number those of {model}")
        figures = readback.measure(path, gguf, weights, None)
    except ArtifactError as error:
        return Row(what, "wrong", "", error.message)
    return Row(what, "ok", "", f"those of {model}, at most {100 * figures.error:.2g} % off in a sample")


def _made_of(gguf: Gguf, folder: BuildFolder) -> "tuple[Path, dict[str, Weight]]":
    """The folder that a file was made of, and its weights. Raises ArtifactError where it is gone or damaged."""
    from tutor.formats.models.gguf_weights import adapter_weights_of, weights_of

    if gguf.fields.get("general.type") == "adapter":
        model = folder.stage("train")
        weights = adapter_weights_of(model, _base_folder(folder))
    else:
        tuned = "merged.sha256" in lineage.lineage_of(gguf.fields)
        model = folder.stage("merge") if tuned else _base_folder(folder)
        weights = weights_of(model)
    if not weights:
        raise ArtifactError(f"{model} holds no weights")
    return model, weights


def _computed(said: Mapping[str, str], recipe: Recipe, folder: BuildFolder) -> list[Row]:
    """A row for each key-value, computed again."""
    places: dict[str, Callable[[], str]] = {
        "data.sha256": lambda: file_sha256(folder.stage("data") / "train.jsonl"),
        "recipe.sha256": lambda: lineage.recipe_hash(recipe),
        "adapter.sha256": lambda: lineage.weights_hash(folder.stage("train")),
        "merged.sha256": lambda: lineage.weights_hash(folder.stage("merge")),
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


def _base_folder(folder: BuildFolder) -> Path:
    return read_facts(folder.stage("base"))[1]


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
