"""The convert stage: the merged model as GGUF, in 16 bits and quantized; every file is read back and compared.

In: merged/, base/ (its facts, and its 16-bit weights), data/ and adapter/ (their hashes for the lineage; the training
rows for an importance matrix). Out: `tutor-F16.gguf` (`tutor-BF16.gguf` where the base's family needs it),
`tutor-<Q>.gguf` for each quantization; if the recipe sets them, `base-<Q>.gguf` (in 16 bits only where that is served)
and importance matrices. Does not merge, choose or publish.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.layout import gguf_name
from tutor.engines.llamacpp.convert import Conversion, imatrix, quantize, to_gguf
from tutor.errors import ArtifactError
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.gguf_metadata import (
    Metadata,
    check_gguf,
    count_fallbacks,
    implied_metadata,
    metadata_differences,
)
from tutor.formats.models.gguf_weights import Weight, weights_of
from tutor.formats.models.model_folder import read_facts
from tutor.formats.models.prompt_format import read_format
from tutor.formats.models.served_quantization import possible_quantizations
from tutor.formats.rows.split_files import TRAIN, read_split
from tutor.machine.host import usable_cores
from tutor.machine.memory.shapes import read_shape
from tutor.machine.run_cost import convert_bytes, converted_together, require_disk
from tutor.prompt.format import PromptFormat, asked_messages
from tutor.prompt.messages import row_answer
from tutor.prompt.tutor_format import TUTOR
from tutor.stages.convert.lineage import base_lineage, to_fields, tutor_lineage
from tutor.stages.convert.quantization_error import (
    QuantizationError,
    measure,
    replacement_types,
    require_exact,
    require_kept,
    unfit_types,
)

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

CALIBRATION_CHARACTERS = 150_000
"""Number of characters of training text for an importance matrix: about a hundred pieces of 512 tokens."""


@dataclass(frozen=True)
class CalibrationText:
    """The text of the importance matrix."""

    rows: Sequence[Mapping[str, Any]]  # of the training; empty: no matrix is made
    system: str = ""
    prompt: PromptFormat = TUTOR

    def render(self, bos: str, end: str) -> str:
        """Return equidistant rows as in training, one after the other; the tokenizer adds the first BOS."""
        rows = calibration_rows(self.rows)
        return (end + bos).join(self._row(row) for row in rows) + end

    def _row(self, row: Mapping[str, Any]) -> str:
        messages = asked_messages(self.prompt, row, self.system)
        return self.prompt.render(messages) + self.prompt.completion(row_answer(row))


@dataclass(frozen=True)
class ConversionSource:
    """A model to convert: its folder, and the expected content of its files."""

    name: str
    folder: Path
    expected: Metadata
    lineage: Mapping[str, str]  # as key-values of the file
    text: CalibrationText
    base: Mapping[str, Weight] | None  # the untuned weights; None for the base itself

    def reference(self, out: Path) -> Path:
        """Return the path of the 16-bit file, of which every quantization is made."""
        return out / gguf_name(self.name, self.expected.file_type)


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write and check every GGUF file of a recipe; return their sizes, types and errors.

    Raises ArtifactError when a folder cannot be converted or a file differs from its folder, GateError when a
    quantization does not keep the LoRA update.
    """
    facts, base = read_facts(inputs["base"])
    prompt = read_format(recipe, inputs["base"])
    expected = {name: implied_metadata(folder, facts) for name, folder in (("tutor", inputs["merge"]), ("base", base))}
    if lines := metadata_differences(expected["base"], expected["tutor"]):
        raise ArtifactError(f"{inputs['merge']} does not match its base {base}:\n  " + "\n  ".join(lines))
    template, end = prompt.chat_template(add_bos=facts.add_bos), prompt.end_id
    expected["tutor"] = replace(expected["tutor"], chat_template=template, eos=facts.eos if end is None else end)
    if prompt.kind == "base":  # with the adapter apart, the base's file renders the prompts
        expected["base"] = replace(expected["base"], chat_template=template)
    rows = read_split(inputs["data"], TRAIN) if recipe.convert.imatrix else []
    text = CalibrationText(rows, recipe.system, prompt)
    quantizations = recipe.convert.quantizations
    reference = expected["base"].file_type
    may_be_served = possible_quantizations(recipe.ollama.quantization, quantizations)
    wanted: dict[str, list[str]] = {"tutor": [*quantizations]}
    if recipe.convert.base:
        # First, so that its 16-bit file is gone before the tutor's is there. The evaluate stage compares both in the
        # served quantization, which the ladder stage chooses only later.
        wanted = {"base": [kind for kind in may_be_served if kind != reference], **wanted}
    folders = {"tutor": inputs["merge"], "base": base}
    keep_base = recipe.ollama.quantization == reference
    shape = read_shape(base)
    need = convert_bytes(shape, quantizations, wanted.get("base"), keep_base=keep_base)
    require_disk(out, need, "converting", "free disk space, or set fewer convert.quantizations")
    lineage = {"tutor": to_fields(tutor_lineage(recipe, inputs)), "base": to_fields(base_lineage(inputs["base"]))}
    sources = [
        ConversionSource(
            name,
            folders[name],
            expected[name],
            lineage[name],
            text,
            weights_of(base) if name == "tutor" else None,
        )
        for name in wanted
    ]
    files: dict[str, dict[str, Any]] = {}
    for group in [sources] if converted_together(shape) else [[source] for source in sources]:
        _to_16_bits(group, out)
        for source in group:
            files |= quantize_model(source, wanted[source.name], out)
            if source.name == "base" and not keep_base:
                source.reference(out).unlink()  # needed for quantization only
                del files[source.reference(out).name]
    return {"files": files, "pre_tokenizer": facts.pre_tokenizer, "lineage": lineage["tutor"]}


def _to_16_bits(sources: Sequence[ConversionSource], out: Path) -> None:
    """Write the 16-bit file of each model."""
    started = time.monotonic()
    targets = [source.reference(out) for source in sources]
    log.info("converting %s to GGUF", " and ".join(str(source.folder) for source in sources))
    to_gguf(
        *(
            Conversion(
                source.folder,
                target,
                source.expected.pre_tokenizer or "",
                source.lineage,
                # Merged weights have the template and the end in their folder.
                chat_template=source.expected.chat_template if source.base is None else None,
                end=source.text.prompt.end_id if source.base is None else None,
            )
            for source, target in zip(sources, targets, strict=True)
        )
    )
    log.info("converted in %.1f s", time.monotonic() - started)


def quantize_model(source: ConversionSource, kinds: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Check the 16-bit file of a model, write and check its quantizations; return one entry a file."""
    weights = weights_of(source.folder)
    whole = source.reference(out)
    started = time.monotonic()
    log.info("comparing %s with %s", whole.name, source.folder)
    gguf = check_gguf(whole, source.expected)
    require_exact(whole, gguf, weights)
    entries = {whole.name: _entry(whole, source.expected.file_type, gguf, started)}
    matrix = importance_matrix(source, whole, out) if source.text.rows and kinds else None
    for kind in kinds:
        started = time.monotonic()
        target = out / gguf_name(source.name, kind)
        log.info("quantizing %s to %s", whole.name, kind)
        gguf, errors = _quantized(source, weights, target, kind, matrix)
        entries[target.name] = {**_entry(target, kind, gguf, started), **errors}
    return entries


def _quantized(
    source: ConversionSource, weights: Mapping[str, Weight], target: Path, kind: str, matrix: Path | None
) -> tuple[Gguf, dict[str, Any]]:
    """Make and check a quantization; a second time without a fallback type that does not keep the LoRA update."""
    whole = source.reference(target.parent)
    expected, threads = replace(source.expected, file_type=kind), usable_cores()

    def make(types: Mapping[str, str] | None = None) -> tuple[Gguf, QuantizationError]:
        quantize(whole, target, kind, threads, matrix=matrix, types=types)
        gguf = check_gguf(target, expected)
        return gguf, measure(target, gguf, weights, source.base)

    gguf, measured = make()
    unfit = {
        each: sum(tensor.kind == each for tensor in gguf.tensors.values()) for each in unfit_types(gguf, kind, measured)
    }
    if unfit:
        log.info("%s: %s does not keep the LoRA update; quantizing again without this type", kind, ", ".join(unfit))
        gguf, measured = make(replacement_types(gguf, unfit))
    require_kept(target, kind, measured)
    return gguf, {"error": measured.error, "kept": measured.kept, **({"replaced": unfit} if unfit else {})}


def _entry(path: Path, kind: str, gguf: Gguf, started: float) -> dict[str, Any]:
    size, seconds = path.stat().st_size, time.monotonic() - started
    log.info("%s has %.1f MB, made and checked in %.1f s", path.name, size / 1e6, seconds)
    return {"size": size, "quantization": kind, "fallback_tensors": count_fallbacks(gguf, kind)}


def importance_matrix(source: ConversionSource, whole: Path, out: Path) -> Path:
    """Write the importance matrix of a model from training rows, rendered as in training; return its path."""
    fields = read_gguf(whole).fields
    tokens = fields["tokenizer.ggml.tokens"]
    bos = tokens[source.expected.bos] if source.expected.add_bos and source.expected.bos is not None else ""
    eos = tokens[fields["tokenizer.ggml.eos_token_id"]]
    text = source.text.render(bos, eos)
    # File names only: the matrix and every file made with it contain these names.
    text_file, matrix = out / "train.txt", out / f"{source.name}.imatrix"
    log.info("computing the importance matrix of %s from the training rows", whole.name)
    text_file.write_text(text, "utf-8")
    try:
        # A lower bound of the number of tokens is enough: texts average less than eight characters a token.
        imatrix(whole, text_file, matrix, len(text) // 8, usable_cores())
    finally:
        text_file.unlink()
    return matrix


def calibration_rows(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return equidistant rows with about CALIBRATION_CHARACTERS characters together; all rows of a smaller set."""
    length = sum(len(row["instruction"]) + len(row["response"]) for row in rows)
    count = min(len(rows), max(1, len(rows) * CALIBRATION_CHARACTERS // max(length, 1)))
    return [rows[index * len(rows) // count] for index in range(count)]
