"""What a GGUF says of itself, and what it must say because of the folder that it is made of. Compares no weights.

In: a 16-bit model folder and its facts; a GGUF without its data. Out: both in the same words, and where they differ.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from gguf import LlamaFileType
from safetensors import SafetensorError, safe_open

from tutor.errors import ArtifactError
from tutor.formats.models.gguf import SAME_SPLIT, Gguf, Tensor, read_gguf
from tutor.formats.models.model_folder import SIXTEEN_BIT, WEIGHTS, Facts, read_json, refuse
from tutor.recipe.quantizations import F16

DTYPES = ("F16", "BF16", "F32")
"""safetensors' names of what may be converted; anything else is how a quantized model is stored."""
BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
"""Types, and quantizations of the same names; all others have blocks of 256."""


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
                            f"{path}: {name} is {part.get_dtype()}: it is already quantized",
                            SIXTEEN_BIT,
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
    """How many matrices have another type than the quantization gives."""
    return sum(is_fallback(name, tensor, kind) for name, tensor in gguf.tensors.items())


def is_fallback(name: str, tensor: Tensor, kind: str) -> bool:
    """Whether a matrix has another type than its quantization gives: its rows do not divide into blocks of 256.

    As llama-quantize counts them: what it chooses for the embedding and the output is no fallback.
    """
    if len(tensor.shape) < 2 or name in ("token_embd.weight", "output.weight"):
        return False
    small = (*BLOCKS_OF_32, F16)
    return tensor.kind != kind if kind in small else tensor.kind in small


def _file_type(number: int | None) -> str:
    names = [item.name for item in LlamaFileType if item == number]
    return str(names[0]).removeprefix("MOSTLY_") if names else f"type {number}"


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")
