"""Convert, quantize and make importance matrices with the pinned llama.cpp. A file is complete or absent.

In: model folders, GGUF files, a text. Out: files. Does not check their contents (stages/convert/ does).
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tutor.artifacts.disk import read_json
from tutor.engines.llamacpp.build import SOURCE, VERSION
from tutor.engines.llamacpp.process import (
    OFFLINE,
    Command,
    partial_path,
    program_error,
    programs,
    write_file,
    write_files,
)
from tutor.engines.llamacpp.src.convert import CONVERTING
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.architectures import architecture_of
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.pre_tokenizer import equivalent_names
from tutor.formats.models.safetensors import SIXTEEN_BIT, weight_files
from tutor.recipe.quantizations import KINDS

CHUNK_LENGTHS = (512, 256, 128, 64, 32)
"""Context lengths in tokens to choose from for llama-imatrix, which needs a text of two chunks at least."""


@dataclass(frozen=True)
class Conversion:
    """A 16-bit Hugging Face folder, and the GGUF to write of it: in 16 bits as its family needs, or in `kind`."""

    model: Path
    target: Path
    pre_tokenizer: str  # llama.cpp's name of the splitting (formats/models/pre_tokenizer.py); "" for SentencePiece
    metadata: Mapping[str, str] = field(default_factory=dict)  # additional key-values
    vocabulary_only: bool = False  # write the metadata and the tokenizer, without tensors: no weight is read
    kind: str | None = None  # F16, BF16 or F32; None: the family's reference
    chat_template: str | None = None  # in place of the folder's own
    end: int | None = None  # id of the token that ends a turn, where the file must name it besides EOS


def to_gguf(*conversions: Conversion) -> None:
    """Write the 16-bit GGUF of each folder, in one process, completely or none.

    Raises ArtifactError with the converter's last line.
    """
    families = [
        architecture_of(read_json(item.model / "config.json").get("model_type"), str(item.model))
        for item in conversions
    ]
    jobs = [
        {
            "model": str(item.model),
            "target": str(partial_path(item.target)),
            "names": equivalent_names(item.pre_tokenizer) if item.pre_tokenizer else (),
            "metadata": dict(item.metadata),
            "chat_template": item.chat_template,
            "end": item.end,
            "architecture": family.class_name,
            "type": (item.kind or family.reference).lower(),
            "files": [path.name for path in weight_files(item.model)],
            "options": ["--vocab-only"] if item.vocabulary_only else [],
        }
        for item, family in zip(conversions, families, strict=True)
    ]
    command: Command = [sys.executable, SOURCE / "convert.py", programs().folder, json.dumps(jobs)]
    code, output = write_files([item.target for item in conversions], command, OFFLINE)
    begun = len(re.findall(f"^{CONVERTING}", output, re.MULTILINE))
    model = conversions[max(begun, 1) - 1].model
    if "BPE pre-tokenizer was not recognized" in output and code:
        found = re.search(r"chkhsh:\s*([0-9a-f]{64})", output)
        raise ArtifactError(
            f"cannot convert {model}: its BPE pre-tokenizer was not recognized (chkhsh {found[1] if found else '?'}) "
            f"by the pinned llama.cpp (of llama_cpp_python {VERSION})",
            "tokenizer changed? compare tokenizer.json with the base's",
        )
    if code:
        raise program_error(f"cannot convert {model}", code, output, output.rpartition("\n")[2])


def quantize(
    source: Path,
    target: Path,
    kind: str,
    threads: int,
    *,
    matrix: Path | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantize a 16- or 32-bit GGUF.

    `matrix` is a file that `imatrix` wrote; `types` overrides llama.cpp's choice of type for tensors by name.
    Raises RecipeError for an unknown kind or a quantized source, ArtifactError when the program fails.
    """
    import gguf

    if kind not in KINDS:
        raise RecipeError(f"unknown quantization {kind!r}", f"known: {', '.join(KINDS)}")
    number = read_gguf(source).fields.get("general.file_type", gguf.LlamaFileType.GUESSED)
    if number not in (gguf.LlamaFileType.ALL_F32, gguf.LlamaFileType.MOSTLY_F16, gguf.LlamaFileType.MOSTLY_BF16):
        name = next((item.name.removeprefix("MOSTLY_") for item in gguf.LlamaFileType if item == number), str(number))
        raise RecipeError(f"{source} is already quantized ({name})", SIXTEEN_BIT)
    options: list[str | Path | int] = ["--imatrix", matrix.name] if matrix else []
    for name, type_ in (types or {}).items():
        options += ["--tensor-type", f"^{re.escape(name)}$={type_.lower()}"]
    # The GGUF stores the matrix's path as given: a bare name, so that two build folders give the same bytes.
    program = programs("llama-quantize").quantize
    command = [program, *options, source.resolve(), partial_path(target).resolve(), kind, threads]
    code, output = write_file(target, command, folder=matrix.parent if matrix else None)
    if code:
        raise program_error(f"cannot quantize {source} to {kind}", code, output)


def imatrix(source: Path, text: Path, target: Path, tokens: int, threads: int) -> None:
    """Write llama.cpp's importance matrix (the effect of each weight) for a text in the folder of `target`.

    `tokens` is the text's approximate length. Raises ArtifactError when it is too short or the program fails.
    """
    chunk = next((chunk for chunk in CHUNK_LENGTHS if 2 * chunk <= tokens), CHUNK_LENGTHS[-1])
    command: list[str | Path | int] = [programs("llama-imatrix").imatrix, "-m", source.resolve(), "-f", text.name]
    command += ["-o", partial_path(target).resolve(), "--output-format", "gguf", "-c", chunk, "-b", max(CHUNK_LENGTHS)]
    command += ["-t", threads, "-tb", threads, "--parse-special", "--no-ppl", "--fit", "off", "--offline"]
    code, output = write_file(target, command, folder=text.parent)
    if code:
        raise program_error(f"cannot make an importance matrix of {source}", code, output)
