"""The convert stage: the merged model as GGUF, F16 and quantized; every file read back and compared with its folder.

In: base/ (its facts, and its 16-bit folder to compare with) and merged/. Out: `tutor-F16.gguf`, `tutor-<Q>.gguf` for
each quantization, and where asked `base-<served>.gguf`. Does not merge and does not publish.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import LlamaFileType
from safetensors import SafetensorError, safe_open

from tutor.engines.gguf_file import SAME_SPLIT, Gguf, read_gguf
from tutor.engines.llamacpp import quantize, to_gguf
from tutor.errors import ArtifactError, HostError
from tutor.modelfolder import WEIGHTS, Facts, read_facts, read_json, refuse
from tutor.template import chat_template

if TYPE_CHECKING:
    from tutor.recipe import Recipe

log = logging.getLogger(__name__)

F16 = "F16"
DTYPES = ("F16", "BF16", "F32")
"""safetensors' names of what may be converted; anything else is how a quantized model is stored."""
LARGEST_SHARE = 0.55
"""Of F16's size: what Q8_0, the largest quantization, takes, rounded up."""


@dataclass(frozen=True)
class Expected:
    """What a GGUF must say because its model folder says so; what is found is told in the same words."""

    architecture: str | None
    file_type: str  # F16, Q4_K_M, ...
    vocabulary: int  # tokens in the tokenizer's list
    embedding_rows: int
    blocks: int | None
    context: int | None
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool | None  # None: not said, and llama.cpp would add one
    pre_tokenizer: str | None
    rope_base: float  # to six digits: the file keeps 32 bits of it
    rope_factors: bool  # whether it has them, as llama3 scaling needs
    tensors: int
    chat_template: str | None  # None where expected: the folder's own, whatever it is


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write and check every GGUF file of a recipe into `out`: their sizes, and how many tensors fell back.

    Raises ArtifactError when a folder cannot be converted or a file does not say what its folder says.
    """
    facts, base = read_facts(inputs["base"])
    served = recipe.ollama.quantization
    folders = {"tutor": inputs["merge"], "base": base}
    says = {name: expect(folder, facts) for name, folder in folders.items()}
    if lines := differences(says["base"], says["tutor"]):
        raise ArtifactError(f"{inputs['merge']} is not like its base {base}:\n  " + "\n  ".join(lines))
    says["tutor"] = replace(says["tutor"], chat_template=chat_template(add_bos=facts.add_bos))
    wanted: dict[str, list[str]] = {"tutor": [*recipe.convert.quantizations]}
    if recipe.convert.base:
        wanted["base"] = [served] if served != F16 else []
    _check_room([(folders[name], kinds) for name, kinds in wanted.items()], out)
    files: dict[str, dict[str, Any]] = {}
    for name, kinds in wanted.items():
        files |= convert(name, says[name], folders[name], kinds, out)
    if recipe.convert.base and served != F16:
        # It was there to be quantized: the base is compared as the tutor is served.
        (out / file_name("base", F16)).unlink()
        del files[file_name("base", F16)]
    return {"files": files, "pre_tokenizer": facts.pre_tokenizer}


def file_name(model: str, kind: str) -> str:
    """What the GGUF file of a model and a quantization is called."""
    return f"{model}-{kind}.gguf"


def convert(name: str, expected: Expected, model: Path, kinds: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Write the F16 file of a folder and its quantizations into `out`, each checked; an entry a file."""
    source = out / file_name(name, F16)
    entries = {}
    for kind in (F16, *kinds):
        started = time.monotonic()
        target = out / file_name(name, kind)
        if kind == F16:
            log.info("converting %s to %s", model, target.name)
            to_gguf(model, target, expected.pre_tokenizer or "")
        else:
            log.info("quantizing %s to %s", source.name, kind)
            quantize(source, target, kind, len(os.sched_getaffinity(0)))
        gguf = check_gguf(target, replace(expected, file_type=kind))
        size, seconds = target.stat().st_size, time.monotonic() - started
        log.info("%s has %.1f MB, made and checked in %.1f s", target.name, size / 1e6, seconds)
        entries[target.name] = {"size": size, "quantization": kind, "fallback_tensors": fallbacks(gguf, kind)}
    return entries


def expect(model: Path, facts: Facts) -> Expected:
    """What a folder's F16 file must say, template aside. Raises ArtifactError where it is not whole or not 16-bit."""
    refuse(model)
    config = read_json(model / "config.json")
    shapes = weight_shapes(model)
    rope = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta"),
    }
    scaled = (rope.get("rope_type") or rope.get("type")) == "llama3"
    ids = {name: getattr(facts, name) for name in ("bos", "eos", "pad")}
    # The converter asks the configuration where the tokenizer is silent.
    ids = {name: config.get(f"{name}_token_id") if id_ is None else id_ for name, id_ in ids.items()}
    try:
        return Expected(
            architecture="llama",
            file_type=F16,
            vocabulary=facts.vocabulary,
            embedding_rows=shapes["model.embed_tokens.weight"][0],
            blocks=config["num_hidden_layers"],
            context=config["max_position_embeddings"],
            **ids,
            add_bos=facts.add_bos,
            pre_tokenizer=facts.pre_tokenizer,
            rope_base=_six_digits(rope.get("rope_theta") or 10000.0),
            rope_factors=scaled,
            tensors=len(shapes) + scaled,
            chat_template=None,
        )
    except KeyError as missing:
        raise ArtifactError(f"{model} lacks {missing}") from None


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a folder's weights, from the files' headers. Raises ArtifactError where they are not 16-bit."""
    shapes = {}
    for path in sorted(model.glob(WEIGHTS)):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ArtifactError(
                            f"{path}: {name} is {part.get_dtype()}: a quantized model cannot be converted",
                            "merge into the 16-bit base",
                        )
                    shapes[name] = tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from None
    return {name: shape for name, shape in shapes.items() if not name.endswith(".rotary_emb.inv_freq")}


def check_gguf(path: Path, expected: Expected) -> Gguf:
    """Read a GGUF back. Raises ArtifactError when it is not whole, or with a line for each thing it says otherwise."""
    gguf = read_gguf(path)
    found = describe(gguf)
    if lines := differences(expected, found):
        raise ArtifactError(f"{path} is not what it was made from:\n  " + "\n  ".join(lines))
    return gguf


def describe(gguf: Gguf) -> Expected:
    """What a GGUF says of itself."""
    said = gguf.fields.get
    embedding = gguf.tensors.get("token_embd.weight")
    pre = said("tokenizer.ggml.pre") if said("tokenizer.ggml.model") == "gpt2" else ""
    adds_bos_unless_told = pre in ("", "llama-bpe", *SAME_SPLIT["llama-bpe"])
    return Expected(
        architecture=said("general.architecture"),
        file_type=_file_type(said("general.file_type")),
        vocabulary=len(said("tokenizer.ggml.tokens", ())),
        embedding_rows=embedding.shape[-1] if embedding else 0,
        blocks=said("llama.block_count"),
        context=said("llama.context_length"),
        bos=said("tokenizer.ggml.bos_token_id"),
        eos=said("tokenizer.ggml.eos_token_id"),
        pad=said("tokenizer.ggml.padding_token_id"),
        add_bos=said("tokenizer.ggml.add_bos_token", None if adds_bos_unless_told else False),
        pre_tokenizer=pre,
        rope_base=_six_digits(said("llama.rope.freq_base", 10000.0)),
        rope_factors="rope_freqs.weight" in gguf.tensors,
        tensors=len(gguf.tensors),
        chat_template=said("tokenizer.chat_template"),
    )


def differences(expected: Expected, found: Expected) -> list[str]:
    """A line for each thing that is not as expected."""
    lines = []
    for name in (field.name for field in fields(Expected)):
        wanted, has = getattr(expected, name), getattr(found, name)
        if name == "chat_template" and wanted is None:
            continue
        if name == "pre_tokenizer" and has in SAME_SPLIT.get(wanted, ()):
            continue
        if wanted != has:
            lines.append(f"{name}: expected {wanted!r}, found {has!r}")
    return lines


def fallbacks(gguf: Gguf, kind: str) -> int:
    """How many matrices have another type than the quantization gives: their rows do not divide into its blocks.

    As llama-quantize counts them: what it chooses for the embedding and the output is no fallback.
    """
    matrices = {name: tensor.kind for name, tensor in gguf.tensors.items() if len(tensor.shape) > 1}
    types = [found for name, found in matrices.items() if name not in ("token_embd.weight", "output.weight")]
    usual = [found.endswith("_K") if "_K" in kind else found == kind for found in types]
    return usual.count(False)


def _file_type(number: int | None) -> str:
    names = [item.name for item in LlamaFileType if item == number]
    return str(names[0]).removeprefix("MOSTLY_") if names else f"type {number}"


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")


def _check_room(wanted: Iterable[tuple[Path, Sequence[str]]], out: Path) -> None:
    """Raise HostError before the work when the disk cannot hold it."""
    need = sum(
        sum(path.stat().st_size for path in model.glob(WEIGHTS)) * (1 + LARGEST_SHARE * len(kinds))
        for model, kinds in wanted
    )
    free = shutil.disk_usage(out).free
    if need > free:
        raise HostError(
            f"{out} has {free / 1e9:.1f} GB free, converting needs {need / 1e9:.1f} GB",
            "make room, or ask for fewer convert.quantizations",
        )
