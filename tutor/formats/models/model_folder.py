"""A Hugging Face model folder: its facts, its configuration, its tokenizer, and what makes it unfit as a base.

In: a model folder, or the base stage's folder. Out: facts, JSON, the tokenizer, or the error. Changes no file and loads
no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import SIXTEEN_BIT, WEIGHTS, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Patterns of weight files that can run code when they are loaded."""
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding's weight."""
CANARIES = (
    "¿Qué es una interfaz en TypeScript? El niño preguntó: «¿y los genéricos?».",
    "function suma(a: number): number {\n  if (a > 0) {\n    return a + 1;\n  }\n\treturn 0;\n}\n",
    "  dos espacios, 12345 números, `código` y … ¡ñandú!\r\nÁÉÍÓÚ ü 👩‍💻",
)
"""Texts that a tokenizer must decode unchanged; transformers 5.3.0 to 5.21.1 dropped the blanks (docs/facts.md, 2)."""


@dataclass(frozen=True)
class Facts:
    """Facts of the base that later stages need: the content of base.json."""

    source: str
    model: str  # the 16-bit folder, relative to the stage's folder or absolute
    weights: str  # sha256 over names and contents of the weight files: the base's identity
    vocabulary: int  # rows of the embedding
    add_bos: bool
    bos: int | None
    eos: int
    pad: int | None
    pre_tokenizer: str  # llama.cpp's name for the splitting of a byte-level BPE; "" for SentencePiece


def read_facts(base: Path) -> tuple[Facts, Path]:
    """Return the facts that the base stage wrote, and the 16-bit folder that they describe."""
    values = read_json(base / "base.json")
    if set(values) != {field.name for field in fields(Facts)}:
        raise ArtifactError(f"{base / 'base.json'} is of another version", "run: tutor base")
    facts = Facts(**values)
    return facts, (base / facts.model).resolve()


def check_model_folder(model: Path) -> None:
    """Raise ArtifactError for a base that cannot be tuned: quantized, pickled, with code, incomplete, not a Llama."""
    config = read_json(model / "config.json")
    check_model_config(config, str(model))
    files = sorted(model.glob(WEIGHTS))
    if not files:
        pickles = [path.name for pattern in PICKLES for path in model.glob(pattern)]
        if pickles:
            raise ArtifactError(
                f"{model} has its weights as pickles ({pickles[0]}), which can run code when loaded",
                "convert them to safetensors first",
            )
        raise ArtifactError(f"{model} holds no {WEIGHTS}")
    index = model / "model.safetensors.index.json"
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise ArtifactError(f"{index} is damaged: it has no weight_map", "fetch it again")
        wanted = set(named.values())
        if missing := sorted(name for name in wanted if not (model / name).is_file()):
            raise ArtifactError(f"{model} lacks {', '.join(missing)}, which its index names", "fetch them again")
    for path in files:
        read_header(path)  # raises for a header that does not fit its file, and for quantized numbers


def check_model_config(config: Mapping[str, Any], where: str) -> None:
    """Raise those errors of `check_model_folder` that the configuration alone decides: they come before a download."""
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise ArtifactError(f"{where} is already quantized ({method}); the base must be 16-bit", SIXTEEN_BIT)
    if "auto_map" in config:
        raise ArtifactError(f"{where} brings code of its own (auto_map), which is never run", "name another base")
    if config.get("model_type") != "llama":
        raise ArtifactError(f"{where} is a {config.get('model_type')!r} model; tutor tunes Llamas")


def load_tokenizer(model: Path) -> "PreTrainedTokenizerBase":
    """Return a folder's tokenizer, after a round trip of CANARIES. Raises ArtifactError with the decoded text."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (model / name).exists():  # transformers fails with a traceback where it is no object
            read_json(model / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"cannot load the tokenizer of {model}: {str(error).partition(chr(10))[0]}") from error
    for text in CANARIES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back != text:
            raise ArtifactError(
                f"the tokenizer of {model} does not give a text back: {text!r} became {back!r}",
                "another transformers version reads it wrongly: make install",
            )
    return tokenizer
