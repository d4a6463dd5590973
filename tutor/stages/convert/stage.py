"""The convert stage: the merged model as GGUF, F16 and quantized; every file read back and compared with its folder.

In: merged/, base/ (its facts, and its 16-bit folder to compare with), data/ and adapter/ (what the files say of where
they come from; the rows weigh the weights). Out: `tutor-F16.gguf`, `tutor-<Q>.gguf` for each quantization, where
asked `base-<Q>.gguf` and importance matrices. Does not merge, choose or publish.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.layout import gguf_name
from tutor.engines.llamacpp.convert import imatrix, quantize, to_gguf
from tutor.errors import ArtifactError
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.gguf_metadata import Expected, check_gguf, differences, expect, fallbacks
from tutor.formats.models.gguf_weights import Weight, weights_of
from tutor.formats.models.model_folder import read_facts
from tutor.formats.rows.split_files import read_rows
from tutor.machine.memory.shapes import read_shape
from tutor.machine.run_cost import gguf_bytes, require_disk
from tutor.prompt import chat_template, completion, conversation, render
from tutor.recipe.quantizations import AUTO, F16
from tutor.stages.convert.lineage import base_lineage, keyed, tutor_lineage
from tutor.stages.convert.quantization_error import Figures, exact, measure, refuse_lost, replaced, unfit

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

WEIGHED = 150_000
"""Characters of the training split that an importance matrix is made of: about a hundred pieces of 512 tokens."""


@dataclass(frozen=True)
class Source:
    """A model to be converted: its folder, and what its files must hold and say."""

    name: str
    folder: Path
    expected: Expected
    lineage: Mapping[str, str]  # as key-values
    rows: Sequence[Mapping[str, Any]]  # whose text weighs the weights; none: no importance matrix
    system: str
    base: Mapping[str, Weight] | None  # the untuned weights, where these are tuned


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write and check every GGUF file of a recipe into `out`: their sizes, types and distance from the weights.

    Raises ArtifactError when a folder cannot be converted or a file does not hold what its folder holds, GateError
    when a quantization does not keep what was trained.
    """
    facts, base = read_facts(inputs["base"])
    says = {name: expect(folder, facts) for name, folder in (("tutor", inputs["merge"]), ("base", base))}
    if lines := differences(says["base"], says["tutor"]):
        raise ArtifactError(f"{inputs['merge']} is not like its base {base}:\n  " + "\n  ".join(lines))
    says["tutor"] = replace(says["tutor"], chat_template=chat_template(add_bos=facts.add_bos))
    rows = read_rows(inputs["data"] / "train.jsonl") if recipe.convert.imatrix else []
    served = recipe.ollama.quantization
    asked = recipe.convert.quantizations
    wanted: dict[str, list[str]] = {"tutor": [*asked]}
    if recipe.convert.base:
        # Which of them is served is not known before the ladder: the base is compared as the tutor is served.
        wanted["base"] = [*asked] if served == AUTO else [served] if served != F16 else []
    folders = {"tutor": inputs["merge"], "base": base}
    _require_disk([(folders[name], kinds) for name, kinds in wanted.items()], out)
    lineage = {"tutor": keyed(tutor_lineage(recipe, inputs)), "base": keyed(base_lineage(inputs["base"]))}
    files: dict[str, dict[str, Any]] = {}
    for name, kinds in wanted.items():
        untuned = weights_of(base) if name == "tutor" else None
        source = Source(name, folders[name], says[name], lineage[name], rows, recipe.system, untuned)
        files |= convert(source, kinds, out)
    if recipe.convert.base and served not in (F16, AUTO):
        # It was there to be quantized.
        (out / gguf_name("base", F16)).unlink()
        del files[gguf_name("base", F16)]
    return {"files": files, "pre_tokenizer": facts.pre_tokenizer, "lineage": lineage["tutor"]}


def convert(source: Source, kinds: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Write the F16 file of a model and its quantizations into `out`, each checked; an entry a file."""
    weights = weights_of(source.folder)
    whole = out / gguf_name(source.name, F16)
    started = time.monotonic()
    log.info("converting %s to %s", source.folder, whole.name)
    to_gguf(source.folder, whole, source.expected.pre_tokenizer or "", source.lineage)
    gguf = check_gguf(whole, source.expected)
    exact(whole, gguf, weights)
    entries = {whole.name: _entry(whole, F16, gguf, started)}
    matrix = importance(source, whole, out) if source.rows and kinds else None
    for kind in kinds:
        started = time.monotonic()
        target = out / gguf_name(source.name, kind)
        log.info("quantizing %s to %s", whole.name, kind)
        gguf, figures = _quantized(source, weights, target, kind, matrix)
        entries[target.name] = {**_entry(target, kind, gguf, started), **figures}
    return entries


def _quantized(
    source: Source, weights: Mapping[str, Weight], target: Path, kind: str, matrix: Path | None
) -> tuple[Gguf, dict[str, Any]]:
    """Make and check a quantization, a second time where a type that llama.cpp fell back to ruins what was trained."""
    whole = target.with_name(gguf_name(source.name, F16))
    expected, threads = replace(source.expected, file_type=kind), len(os.sched_getaffinity(0))

    def make(types: Mapping[str, str] | None = None) -> tuple[Gguf, Figures]:
        quantize(whole, target, kind, threads, matrix=matrix, types=types)
        gguf = check_gguf(target, expected)
        return gguf, measure(target, gguf, weights, source.base)

    gguf, figures = make()
    instead = {
        each: sum(tensor.kind == each for tensor in gguf.tensors.values()) for each in unfit(gguf, kind, figures)
    }
    if instead:
        log.info("%s: %s does not hold what was trained, quantizing again without it", kind, ", ".join(instead))
        gguf, figures = make(replaced(gguf, instead))
    refuse_lost(target, kind, figures)
    return gguf, {"error": figures.error, "kept": figures.kept, **({"replaced": instead} if instead else {})}


def _entry(path: Path, kind: str, gguf: Gguf, started: float) -> dict[str, Any]:
    size, seconds = path.stat().st_size, time.monotonic() - started
    log.info("%s has %.1f MB, made and checked in %.1f s", path.name, size / 1e6, seconds)
    return {"size": size, "quantization": kind, "fallback_tensors": fallbacks(gguf, kind)}


def importance(source: Source, whole: Path, out: Path) -> Path:
    """The importance matrix of a model on its training rows, rendered as it was trained on them."""
    fields = read_gguf(whole).fields
    tokens = fields["tokenizer.ggml.tokens"]
    bos = tokens[source.expected.bos] if source.expected.add_bos and source.expected.bos is not None else ""
    eos = tokens[fields["tokenizer.ggml.eos_token_id"]]
    text = training_text(fewer(source.rows), source.system, bos, eos)
    # Bare names in one folder: the matrix, and every file made with it, keep them.
    given, matrix = out / "train.txt", out / f"{source.name}.imatrix"
    log.info("weighing %s by the training rows", whole.name)
    given.write_text(text, "utf-8")
    try:
        # A lower bound of the tokens is enough: eight characters a token are more than a text averages.
        imatrix(whole, given, matrix, len(text) // 8, len(os.sched_getaffinity(0)))
    finally:
        given.unlink()
    return matrix


def fewer(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Rows at even distances that hold WEIGHED characters together, about; all where there are no more."""
    length = sum(len(row["instruction"]) + len(row["response"]) for row in rows)
    count = min(len(rows), max(1, len(rows) * WEIGHED // max(length, 1)))
    return [rows[index * len(rows) // count] for index in range(count)]


def training_text(rows: Sequence[Mapping[str, Any]], system: str, bos: str, eos: str) -> str:
    """Rows as the model was trained on them, one behind the other; the first BOS is the tokenizer's own."""
    texts = [render(conversation(row["instruction"], system)) + completion(row["response"]) for row in rows]
    return (eos + bos).join(texts) + eos


def _require_disk(wanted: Iterable[tuple[Path, Sequence[str]]], out: Path) -> None:
    """Raise HostError before the work when the disk cannot hold the files of all models."""
    shapes = [(read_shape(model), kinds) for model, kinds in wanted]
    need = sum(gguf_bytes(shape, kind) for shape, kinds in shapes for kind in (F16, *kinds))
    require_disk(out, need, "converting", "make room, or ask for fewer convert.quantizations")
