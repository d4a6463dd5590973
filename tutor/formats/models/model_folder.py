"""A Hugging Face model folder: its facts, its configuration, its tokenizer, and what makes it unfit as a base.

In: a model folder, or the base stage's folder. Out: facts, JSON, the tokenizer, or the error. Changes no file and loads
no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.architectures import architecture_of
from tutor.formats.models.model_config import check_model_config
from tutor.formats.models.safetensors import INDEX, WEIGHTS, read_folder, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", INDEX)
"""Names of the files that later stages read beside the weights."""
ADAPTER = "adapter_config.json"
"""Name of the file that makes a folder an adapter for transformers."""
LFS_POINTER = b"version https://git-lfs"
"""Beginning of a Git LFS pointer."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Patterns of weight files that can run code when they are loaded."""
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding's weight."""
CANARIES = (
    "¿Qué es una interfaz en TypeScript? El niño preguntó: «¿y los genéricos?».",
    "function suma(a: number): number {\n  if (a > 0) {\n    return a + 1;\n  }\n\treturn 0;\n}\n",
    "x  dos espacios, 12345 números, `código` y … ¡ñandú!\r\nÁÉÍÓÚ ü 👩‍💻",
    "un cafe\u0301 con acento aparte",
)
"""Texts that a tokenizer must decode unchanged; transformers 5.3.0 to 5.21.1 dropped the blanks (docs/facts.md, 2).
None begins with a blank, which SentencePiece loses."""


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
    check: Mapping[str, int] = field(default_factory=dict)  # numbers of what was compared with llama.cpp's conversion
    prompt: Mapping[str, Any] = field(default_factory=dict)  # of its chat template (BaseFormat); {}: not used


def read_facts(base: Path) -> tuple[Facts, Path]:
    """Return the facts that the base stage wrote, and the 16-bit folder that they describe."""
    values = read_json(base / "base.json")
    if set(values) != {field.name for field in fields(Facts)}:
        raise ArtifactError(f"{base / 'base.json'} is of another version", "run: tutor base")
    facts = Facts(**values)
    return facts, (base / facts.model).resolve()


def read_reference(base: Path) -> str:
    """Return the type of the 16-bit GGUF of the base stage's folder: F16, or BF16 where its family needs it."""
    _, model = read_facts(base)
    return architecture_of(read_json(model / "config.json").get("model_type"), str(model)).reference


def check_model_folder(model: Path) -> None:
    """Raise ArtifactError for a base that cannot be tuned: quantized, pickled, with code, incomplete, not a Llama."""
    for path in (model / name for name in TEXT_FILES):
        if path.exists():
            _check_fetched(path)
    check_model_config(read_json(model / "config.json"), str(model))
    if (model / ADAPTER).exists():
        raise ArtifactError(
            f"{model} holds {ADAPTER}: transformers would load the base that it names, and the adapter",
            "merge the adapter first, or remove the file",
        )
    if not any(model.glob(WEIGHTS)) and (pickles := [path.name for each in PICKLES for path in model.glob(each)]):
        raise ArtifactError(
            f"{model} has its weights as pickles ({pickles[0]}), which can run code when loaded",
            "convert them to safetensors first",
        )
    read_json(model / "tokenizer_config.json")  # the merge stage writes the chat template into it
    for path in weight_files(model):
        _check_fetched(path)
    read_folder(model)  # raises for a header that does not fit its file, and for quantized numbers


def ignored_weights(model: Path) -> list[str]:
    """Return the names of a folder's weight files that do not count."""
    files = weight_files(model)
    return sorted(path.name for path in model.glob(WEIGHTS) if path not in files)


def _check_fetched(path: Path) -> None:
    """Raise ArtifactError for an empty file, and for the text that stands in a Git repository for a large file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    if start == LFS_POINTER:
        raise ArtifactError(f"{path} is a Git LFS pointer, not the file itself", "run in its folder: git lfs pull")
    if not start and path.suffix == ".model":
        raise ArtifactError(f"{path} is empty", "fetch it again, or remove it where tokenizer.json is whole")


def load_tokenizer(model: Path) -> "PreTrainedTokenizerBase":
    """Return a folder's tokenizer, after a round trip of CANARIES. Raises ArtifactError with the decoded text."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (model / name).exists():  # transformers fails with a traceback where it is no object
            read_json(model / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        _drop_composition(tokenizer)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in CANARIES]
        decoded = [tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in ids]
    except Exception as error:
        if not is_refusal(error):
            raise
        raise ArtifactError(f"cannot load the tokenizer of {model}: {reason(error)}", "fetch it again") from error
    for text, back in zip(CANARIES, decoded, strict=True):
        if back != text:
            raise ArtifactError(
                f"the tokenizer of {model} does not give a text back: {text!r} became {back!r}",
                "another transformers version reads it wrongly: make install",
            )
    return tokenizer


def _drop_composition(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Read accents as the text has them: Qwen's tokenizers compose them (NFC), and llama.cpp does not.

    What is trained then has the ids of what is served, also for a text in NFD.
    """
    from tokenizers.normalizers import NFC

    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None and isinstance(core.normalizer, NFC):
        core.normalizer = None


def is_refusal(error: Exception) -> bool:
    """Return whether transformers or a library of it refuses a file; tokenizers raises the class Exception itself."""
    from huggingface_hub.errors import StrictDataclassError

    known = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    return type(error) is Exception or isinstance(error, (*known, StrictDataclassError))


def reason(error: Exception) -> str:
    """Return the beginning of an error's text as one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
