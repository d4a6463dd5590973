"""Check that a GGUF file, or a model in Ollama, was made from this recipe and build folder.

In: a file or a published model, the recipe, its build folder. Out: one row for each value that the file records of its
origin, with the recomputed value: ok, wrong, other (software versions, which may differ), or unknown where its source
is missing. Changes nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutor.artifacts.hashing import file_sha256, file_state
from tutor.artifacts.layout import LORA, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.manifest import read_manifest
from tutor.engines.ollama.client import connect
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.formats.models.base_source import public_source
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.model_folder import read_facts
from tutor.formats.rows.split_files import TRAIN
from tutor.recipe.settings import Recipe
from tutor.stages.convert import lineage

if TYPE_CHECKING:
    from tutor.formats.models.gguf_weights import Weight

Condition = Literal["ok", "wrong", "other", "unknown"]
BLOB = re.compile(r"^(?P<word>FROM|ADAPTER)\s.*sha256[-:](?P<digest>[0-9a-f]{64})", re.MULTILINE)
"""Lines of a Modelfile in /api/show that name the files of a model."""
SIXTEEN_BITS = (1, 32)
"""Values of general.file_type in a file without quantization: F16 and BF16."""


@dataclass(frozen=True)
class Row:
    """One recorded value, and the recomputed one."""

    what: str
    condition: Condition
    recorded: str
    computed: str  # or the reason why it cannot be computed


def verify_file(path: Path, recipe: Recipe, build: Path) -> list[Row]:
    """Return the rows of a GGUF file.

    Raises ArtifactError for a damaged file, one without a recorded origin, or one that changes meanwhile.
    """
    state = file_state(path)
    gguf = read_gguf(path)
    recorded = lineage.from_fields(gguf.fields)
    if not recorded:
        raise ArtifactError(f"{path} does not record its origin", "was it made by another program than tutor convert?")
    folder = BuildFolder(build, recipe.name)
    known = _file_row("file", file_sha256(path), folder, _recorded_files(folder))
    weights = _weights_row("weights", path, gguf, folder)
    if file_state(path) != state:
        raise ArtifactError(f"{path} changed while it was read", "run again when no other program writes it")
    return [known, weights, *_lineage_rows(recorded, recipe, folder)]


def verify_model(model: str, host: str | None, recipe: Recipe, build: Path) -> list[Row]:
    """Return the rows of a model on an Ollama server: the digests of its files, and the origin that its GGUF records.

    The weights of a local file with the digest of the server's file are compared in its place.
    Raises ServiceError without the server or the model, ArtifactError for a model without a recorded origin.
    """
    with connect(host) as server:
        shown = server.show(model)
        if shown is None:
            raise ServiceError(f"{server.host} has no model {model!r}", "see: tutor models")
    recorded = lineage.from_fields(shown.get("model_info") or {})
    if not recorded:
        raise ArtifactError(f"{model} does not record its origin", "was it published by another program?")
    folder = BuildFolder(build, recipe.name)
    made, rows = _recorded_files(folder), []
    for found in BLOB.finditer(str(shown.get("modelfile") or "")):
        adapter, digest = "adapter " if found["word"] == "ADAPTER" else "", found["digest"]
        rows.append(_file_row(f"{adapter}file", digest, folder, made))
        try:
            here = _local_copy(digest, folder, made)
            gguf = read_gguf(here)
            # For a base with an adapter the server returns the metadata of the base alone.
            recorded |= lineage.from_fields(gguf.fields)
            rows.append(_weights_row(f"{adapter}weights", here, gguf, folder))
        except ArtifactError as error:
            rows.append(Row(f"{adapter}weights", "unknown", "", error.message))
    if not rows:
        rows = [Row("file", "unknown", "", "the server does not name the file of the model")]
    return [*rows, *_lineage_rows(recorded, recipe, folder)]


def is_file(name: str) -> bool:
    """Return whether the argument of `tutor verify` is a file. Raises RecipeError for the path of a missing file."""
    path = Path(name)
    if path.is_file():
        return True
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith("."):
        raise RecipeError(f"{name} is not a file", "give a GGUF file, or the name of a model in Ollama")
    return False


def _recorded_files(folder: BuildFolder) -> dict[str, str]:
    """Return the GGUF files in the manifests of the build folder: digest -> name."""
    made: dict[str, str] = {}
    for name in (STAGE_FOLDERS["convert"], LORA):
        with suppress(ArtifactError):  # a damaged manifest records no files
            manifest = read_manifest(folder.path / name)
            outputs = manifest.outputs if manifest else {}
            made |= {entry["sha256"]: f"{name}/{file}" for file, entry in outputs.items() if file.endswith(".gguf")}
    return made


def _local_copy(digest: str, folder: BuildFolder, made: Mapping[str, str]) -> Path:
    """Return the file of the build folder with this digest. Raises ArtifactError without one."""
    if digest not in made:
        raise ArtifactError("the server has the file, and the build folder has no file with its digest")
    path = folder.path / made[digest]
    if not path.is_file() or file_sha256(path) != digest:
        raise ArtifactError(f"the server has the file, and {path} is missing or changed")
    return path


def _file_row(what: str, digest: str, folder: BuildFolder, made: Mapping[str, str]) -> Row:
    """Compare the digest of a file with those in the manifests of the build folder."""
    if not made:
        return Row(what, "unknown", digest, f"{folder.stage('convert')} has no manifest")
    if digest in made:
        return Row(what, "ok", digest, made[digest])
    return Row(what, "wrong", digest, f"not among the {len(made)} files made in {folder.path}")


def _weights_row(what: str, path: Path, gguf: Gguf, folder: BuildFolder) -> Row:
    """Compare the tensors of a file with its source model: all numbers of 16 bits, a sample for other types."""
    from tutor.stages.convert import quantization_error

    try:
        model, weights = _source_weights(gguf, folder)
    except ArtifactError as error:
        return Row(what, "unknown", "", error.message)
    try:
        if gguf.fields.get("general.file_type") in SIXTEEN_BITS:
            quantization_error.require_exact(path, gguf, weights)
            return Row(what, "ok", "", f"all numbers equal those of {model}")
        figures = quantization_error.measure(path, gguf, weights, None)
    except ArtifactError as error:
        return Row(what, "wrong", "", error.message)
    return Row(what, "ok", "", f"those of {model}, with an error of at most {100 * figures.error:.2g} % in a sample")


def _source_weights(gguf: Gguf, folder: BuildFolder) -> "tuple[Path, dict[str, Weight]]":
    """Return the source folder of a file, and its weights. Raises ArtifactError when missing or damaged."""
    from tutor.formats.models.gguf_weights import adapter_weights_of, weights_of

    if gguf.fields.get("general.type") == "adapter":
        model = folder.stage("train")
        weights = adapter_weights_of(model, _base_folder(folder))
    else:
        tuned = "merged.sha256" in lineage.from_fields(gguf.fields)
        model = folder.stage("merge") if tuned else _base_folder(folder)
        weights = weights_of(model)
    if not weights:
        raise ArtifactError(f"{model} contains no weights")
    return model, weights


def _lineage_rows(recorded: Mapping[str, str], recipe: Recipe, folder: BuildFolder) -> list[Row]:
    """Return one row for each recorded value of the origin."""
    places: dict[str, Callable[[], str]] = {
        "data.sha256": lambda: file_sha256(folder.stage("data") / TRAIN),
        "recipe.sha256": lambda: lineage.recipe_hash(recipe),
        "adapter.sha256": lambda: lineage.weights_hash(folder.stage("train")),
        "merged.sha256": lambda: lineage.weights_hash(folder.stage("merge")),
        "base": lambda: _base_name(recipe.base.source, folder),
        "base.sha256": lambda: lineage.weights_hash(_base_folder(folder)),
        **{name: partial(lineage.software().__getitem__, name) for name in lineage.SOFTWARE_KEYS},
    }
    return [_row(name, value, places.get(name)) for name, value in recorded.items()]


def _row(name: str, recorded: str, compute: Callable[[], str] | None) -> Row:
    if compute is None:
        return Row(name, "unknown", recorded, "written by another version of tutor")
    try:
        found = compute()
    except ArtifactError as error:
        return Row(name, "unknown", recorded, error.message)
    if found == recorded:
        return Row(name, "ok", recorded, found)
    return Row(name, "other" if name in lineage.SOFTWARE_KEYS else "wrong", recorded, found)


def _base_name(source: str, folder: BuildFolder) -> str:
    """Return the public name of a base; that of a folder needs the base stage's facts."""
    return public_source(source, read_facts(folder.stage("base"))[0].weights) if source.startswith("path:") else source


def _base_folder(folder: BuildFolder) -> Path:
    return read_facts(folder.stage("base"))[1]


def wrong_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose condition is wrong."""
    return [row for row in rows if row.condition == "wrong"]


def is_shown(rows: Sequence[Row]) -> bool:
    """Return whether the bytes of every file were compared: its sha256, or its tensors, with those of the build folder.

    The other rows compare what the file records, which any program can write into it.
    """
    shown: list[bool] = []
    for row in rows:
        if row.what.endswith("file"):
            shown.append(row.condition == "ok")
        elif row.what.endswith("weights") and shown:  # those of the file in the row before
            shown[-1] |= row.condition == "ok"
    return bool(shown) and all(shown)


def row_lines(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines for a terminal, with shortened hashes."""
    shown = []
    for row in rows:
        if row.condition == "ok":
            text = _brief(row.computed) if row.computed != row.recorded else _brief(row.recorded)
        elif row.condition == "unknown":
            text = f"{_brief(row.recorded)} cannot be checked: {row.computed}".strip()
        else:
            text = f"{_brief(row.recorded)} (here: {_brief(row.computed)})".strip()
        shown.append(f"{row.condition:<8} {row.what:<15} {text}")
    return shown


def _brief(text: str) -> str:
    return f"{text[:16]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def rows_as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON objects."""
    return [
        {"what": row.what, "condition": row.condition, "recorded": row.recorded, "computed": row.computed}
        for row in rows
    ]
