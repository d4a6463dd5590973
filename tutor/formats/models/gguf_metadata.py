"""Compare GGUF metadata with the values that the source model folder implies.

In: a 16-bit model folder and its facts; a GGUF without its data. Out: the metadata of both in one form, and their
differences. Compares no weights (gguf_weights.py does).
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from gguf import LlamaFileType

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.architectures import THETA, architecture_of, layer_windows
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.model_config import local_rope_settings, rope_settings, token_id
from tutor.formats.models.model_folder import EMBEDDING, Facts, check_model_folder
from tutor.formats.models.pre_tokenizer import equivalent_names
from tutor.formats.models.safetensors import folder_weights
from tutor.recipe.quantizations import BF16, F16

BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
"""Types with blocks of 32 numbers, and the quantizations of the same names; all others have blocks of 256."""


@dataclass(frozen=True)
class Metadata:
    """Metadata of a GGUF, found in the file or implied by its model folder."""

    architecture: str | None
    file_type: str  # F16, Q4_K_M, ...
    vocabulary: int  # tokens in the tokenizer's list
    embedding_rows: int
    blocks: int | None
    context: int | None
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool | None  # None: absent, and llama.cpp would add one
    pre_tokenizer: str | None
    rope_base: float  # to six digits: the file keeps 32 bits
    window: int | None  # tokens that a layer with a sliding window sees; None: no layer has one
    local_rope_base: float | None  # of layers with a sliding window, where they have one of their own
    rope_factors: bool  # whether the tensor of them exists, as llama3 scaling needs
    tensors: int
    chat_template: str | None  # None in an expectation: any


def implied_metadata(model: Path, facts: Facts) -> Metadata:
    """Return what a folder implies for its 16-bit file, template aside.

    Raises ArtifactError where the folder is not whole or not 16-bit.
    """
    check_model_folder(model)
    config = read_json(model / "config.json")
    weights = folder_weights(model)
    family = architecture_of(config.get("model_type"), str(model))
    rope, local = rope_settings(config), local_rope_settings(config)
    scaled = rope["rope_type"] == "llama3"
    ids = {name: getattr(facts, name) for name in ("bos", "eos", "pad")}
    # The converter reads the configuration where the tokenizer has no such id
    ids = {name: token_id(config, name) if id_ is None else id_ for name, id_ in ids.items()}
    try:
        return Metadata(
            architecture=family.gguf,
            file_type=family.reference,
            vocabulary=facts.vocabulary,
            embedding_rows=weights[EMBEDDING].shape[0],
            blocks=config["num_hidden_layers"],
            context={**family.defaults, **config}["max_position_embeddings"],
            **ids,
            add_bos=facts.add_bos,
            pre_tokenizer=facts.pre_tokenizer,
            rope_base=_six_digits(rope["rope_theta"]),
            window=next(filter(None, layer_windows(family, config)), None) if family.window_period else None,
            local_rope_base=None if local is None else _six_digits(local["rope_theta"]),
            rope_factors=scaled,
            tensors=len(weights) + scaled,
            chat_template=None,
        )
    except KeyError as missing:
        raise ArtifactError(f"{model} lacks {missing}") from None


def vocabulary_differences(path: Path, expected: Metadata) -> list[str]:
    """Return a line for each value of a converted vocabulary, which holds no tensors, that is not as expected."""
    without = replace(expected, embedding_rows=0, tensors=0, rope_factors=False, chat_template=None)
    return metadata_differences(without, metadata_of(read_gguf(path, vocabulary_only=True)))


def check_gguf(path: Path, expected: Metadata) -> Gguf:
    """Read a GGUF back. Raises ArtifactError when it is not whole, or with a line for each unexpected value."""
    gguf = read_gguf(path)
    if lines := metadata_differences(expected, metadata_of(gguf)):
        raise ArtifactError(f"{path} differs from its source:\n  " + "\n  ".join(lines))
    return gguf


def metadata_of(gguf: Gguf) -> Metadata:
    """Return the metadata of a GGUF."""
    field = gguf.fields.get
    architecture = field("general.architecture")
    embedding = gguf.tensors.get("token_embd.weight")
    local = field(f"{architecture}.rope.freq_base_swa")
    pre = field("tokenizer.ggml.pre") if field("tokenizer.ggml.model") == "gpt2" else ""
    adds_bos_by_default = pre in ("", *equivalent_names("llama-bpe"), "tekken")
    return Metadata(
        architecture=architecture,
        file_type=_file_type(field("general.file_type")),
        vocabulary=len(field("tokenizer.ggml.tokens", ())),
        embedding_rows=embedding.shape[-1] if embedding else 0,
        blocks=field(f"{architecture}.block_count"),
        context=field(f"{architecture}.context_length"),
        bos=field("tokenizer.ggml.bos_token_id"),
        eos=field("tokenizer.ggml.eos_token_id"),
        pad=field("tokenizer.ggml.padding_token_id"),
        add_bos=field("tokenizer.ggml.add_bos_token", None if adds_bos_by_default else False),
        pre_tokenizer=pre,
        rope_base=_six_digits(field(f"{architecture}.rope.freq_base", THETA)),
        window=field(f"{architecture}.attention.sliding_window"),
        local_rope_base=None if local is None else _six_digits(local),
        rope_factors="rope_freqs.weight" in gguf.tensors,
        tensors=len(gguf.tensors),
        chat_template=field("tokenizer.chat_template"),
    )


def metadata_differences(expected: Metadata, found: Metadata) -> list[str]:
    """Return a line for each value that is not as expected."""
    lines = []
    for name in (field.name for field in fields(Metadata)):
        wanted, has = getattr(expected, name), getattr(found, name)
        if name == "chat_template" and wanted is None:
            continue
        if name == "pre_tokenizer" and has in equivalent_names(wanted):
            continue
        if wanted != has:
            lines.append(f"{name}: expected {wanted!r}, found {has!r}")
    return lines


def count_fallbacks(gguf: Gguf, kind: str) -> int:
    """Return the number of matrices that have another type than the quantization gives."""
    return sum(is_fallback(name, tensor, kind) for name, tensor in gguf.tensors.items())


def is_fallback(name: str, tensor: Tensor, kind: str) -> bool:
    """Whether a matrix has another type than its quantization gives, because blocks of 256 do not divide its rows.

    Counted as llama-quantize does: its own choices for the embedding and the output are no fallbacks.
    """
    if len(tensor.shape) < 2 or name in ("token_embd.weight", "output.weight"):
        return False
    small = (*BLOCKS_OF_32, F16, BF16)
    return tensor.kind != kind if kind in small else tensor.kind in small


def _file_type(number: int | None) -> str:
    names = [item.name for item in LlamaFileType if item == number]
    return str(names[0]).removeprefix("MOSTLY_") if names else f"type {number}"


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")
