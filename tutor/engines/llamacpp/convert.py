"""What the pinned llama.cpp makes, whole or not at all: F16 GGUF, quantizations, an importance matrix.

In: model folders, GGUF files, a text. Out: files. Does not judge them (stages/convert/stage.py does).
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tutor.engines.llamacpp.build import SOURCE, VERSION
from tutor.engines.llamacpp.process import OFFLINE, Command, fault, partial_of, programs, write_file
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.gguf import SAME_SPLIT, read_gguf
from tutor.formats.models.model_folder import SIXTEEN_BIT
from tutor.recipe.quantizations import KINDS

CHUNKS = (512, 256, 128, 64, 32)
"""Tokens of a piece of text that llama-imatrix takes at once; it wants two pieces at least."""


def to_gguf(model: Path, target: Path, pre_tokenizer: str, says: Mapping[str, str] | None = None) -> None:
    """Write the F16 GGUF of a 16-bit Hugging Face folder, whole or not at all.

    `pre_tokenizer` is what the function of that name says, `says` are key-values to be in the file.
    Raises ArtifactError with the converter's last line.
    """
    folder, names = programs().folder, ",".join((pre_tokenizer, *SAME_SPLIT.get(pre_tokenizer, ())))
    command: Command = [sys.executable, SOURCE / "convert.py", folder, model, partial_of(target), names]
    code, output = write_file(target, [*command, json.dumps(dict(says or {}))], OFFLINE)
    if "BPE pre-tokenizer was not recognized" in output and code:
        found = re.search(r"chkhsh:\s*([0-9a-f]{64})", output)
        raise ArtifactError(
            f"cannot convert {model}: its BPE pre-tokenizer was not recognized (chkhsh {found[1] if found else '?'}) "
            f"by the pinned llama.cpp (of llama_cpp_python {VERSION})",
            "tokenizer changed? compare tokenizer.json with the base's",
        )
    if code:
        raise fault(f"cannot convert {model}", code, output, output.rpartition("\n")[2])


def quantize(
    source: Path,
    target: Path,
    kind: str,
    threads: int,
    *,
    matrix: Path | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantize a 16- or 32-bit GGUF, whole or not at all.

    `matrix` is what `imatrix` wrote, `types` names tensors that get another type than llama.cpp would choose.
    Raises RecipeError for an unknown kind or a source that is quantized already, ArtifactError where it fails.
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
    # The file keeps the matrix's path as it was given: a bare name, so that two folders give the same bytes.
    command = [programs().quantize, *options, source.resolve(), partial_of(target).resolve(), kind, threads]
    code, output = write_file(target, command, folder=matrix.parent if matrix else None)
    if code:
        raise fault(f"cannot quantize {source} to {kind}", code, output)


def imatrix(source: Path, text: Path, target: Path, tokens: int, threads: int) -> None:
    """Write llama.cpp's importance matrix of a text that lies beside `target`: how much each weight moves the model.

    `tokens` is how long the text is, about. Raises ArtifactError when it is too short or the program fails.
    """
    chunk = next((chunk for chunk in CHUNKS if 2 * chunk <= tokens), CHUNKS[-1])
    command: list[str | Path | int] = [programs().imatrix, "-m", source.resolve(), "-f", text.name]
    command += ["-o", partial_of(target).resolve(), "--output-format", "gguf", "-c", chunk, "-b", max(CHUNKS)]
    command += ["-t", threads, "-tb", threads, "--parse-special", "--no-ppl", "--fit", "off", "--offline"]
    code, output = write_file(target, command, folder=text.parent)
    if code:
        raise fault(f"cannot make an importance matrix of {source}", code, output)
