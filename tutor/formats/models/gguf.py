"""GGUF, llama.cpp's file format: files read back without trusting them, and its name for how a tokenizer splits.

In: a GGUF file, or tokenizer.json. Out: metadata and tensor infos; the value for `tokenizer.ggml.pre`.
`gguf.GGUFReader` is not used: with an array length that is off it walks the whole file item by item and does not end,
it takes files with other bytes behind the last tensor, and a vocabulary costs it seconds.
"""

import itertools
import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_json

VERSION = 3
ALIGNMENT = 32
MAX_DIMENSIONS = 4
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letters for the format's scalar types."""
UINT32, STRING, ARRAY = 4, 8, 9


@dataclass(frozen=True)
class Tensor:
    """What a GGUF says of one tensor."""

    kind: str  # F16, Q4_K, ...
    shape: tuple[int, ...]  # the row's length first
    start: int = field(default=0, compare=False)  # the file's byte at which its data begins


@dataclass(frozen=True)
class Gguf:
    """A GGUF file without its tensors' data."""

    fields: Mapping[str, Any]  # numbers, bools, strings, and lists of them
    tensors: Mapping[str, Tensor]


def read_gguf(path: Path) -> Gguf:
    """What a GGUF file says, every length checked against the file. Raises ArtifactError when it is not whole."""
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data))
    except (OSError, ValueError, struct.error) as error:
        raise ArtifactError(f"{path} is no whole GGUF: {error}", "make it again: tutor convert") from error


class _Cursor:
    """Reads on from where it is, and never behind the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form) * count
        self._fits(size)
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += size
        return values

    def text(self) -> str:
        size = self.number("Q")
        self._fits(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item == STRING:
                self._fits(8 * count)
                return [self.text() for _ in range(count)]
            return list(self.numbers(_form(item), count))
        return self.number(_form(kind))

    def _fits(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes from byte {self.at} on do not fit into its {len(self.data)}")


def _form(kind: int) -> str:
    if kind not in FORMS:
        raise ValueError(f"unknown type {kind} of a value")
    return FORMS[kind]


def _read(cursor: _Cursor) -> Gguf:
    if cursor.data[:4] != b"GGUF":
        raise ValueError(f"it begins with {cursor.data[:4]!r}")
    cursor.at = 4
    version, n_tensors, n_fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version != VERSION:
        raise ValueError(f"version {version}" + (" (big-endian)" if version == VERSION << 24 else ""))
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name, kind = cursor.text(), cursor.number("I")
        if not name or name in fields:
            raise ValueError(f"the key {name!r} is empty or there twice")
        fields[name] = cursor.value(kind)
        if name == "general.alignment" and (kind != UINT32 or fields[name].bit_count() != 1):
            raise ValueError(f"an alignment of {fields[name]}")
    tensors: dict[str, Tensor] = {}
    places = []
    for _ in range(n_tensors):
        name, tensor, offset, size = _tensor(cursor)
        if name in tensors:
            raise ValueError(f"the tensor {name!r} is there twice")
        tensors[name] = tensor
        places.append((offset, size, name))
    alignment = fields.get("general.alignment", ALIGNMENT)
    _check_places(places, cursor, alignment)
    start = _aligned(cursor.at, alignment)
    return Gguf(fields, {name: replace(tensors[name], start=start + offset) for offset, _, name in places})


def _tensor(cursor: _Cursor) -> tuple[str, Tensor, int, int]:
    """Name, description, offset and size in bytes."""
    import gguf

    name, n_dimensions = cursor.text(), cursor.number("I")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {n_dimensions} dimensions")
    shape = cursor.numbers("Q", n_dimensions)
    kind, offset = gguf.GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
    block, block_size = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[0] % block:
        raise ValueError(f"the tensor {name!r} of {kind.name} has the shape {list(shape)}")
    return name, Tensor(kind.name, shape), offset, math.prod(shape) // block * block_size


def _check_places(places: list[tuple[int, int, str]], cursor: _Cursor, alignment: int) -> None:
    """Tensors lie one behind the other, each aligned, and the last one ends the file."""
    if not places:
        raise ValueError("it holds no tensor")
    start = end = _aligned(cursor.at, alignment)
    for offset, size, name in sorted(places):
        if start + offset != _aligned(end, alignment):
            raise ValueError(f"the tensor {name!r} is at byte {start + offset} instead of {_aligned(end, alignment)}")
        end = start + offset + size
    if len(cursor.data) not in (end, _aligned(end, alignment)):
        raise ValueError(f"it has {len(cursor.data)} bytes instead of {_aligned(end, alignment)}")


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[tuple[str, ...], str] = {
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"): "deepseek-coder",
}
"""The patterns of llama.cpp's src/llama-vocab.cpp, applied one after the other, as tokenizer.json writes them."""

SAME_SPLIT = {
    "llama-bpe": ("falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "smaug-bpe", "dbrx"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "megrez", "grok-2"),
    "gpt-2": (
        "phi-2",
        "mpt",
        "olmo",
        "jais",
        "trillion",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "exaone4",
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
}
"""Other names with the very same patterns; the converter may know a tokenizer by one of them."""


def pre_tokenizer(tokenizer_json: Path) -> str:
    """llama.cpp's name for how a byte-level BPE splits text before merging; "" for SentencePiece.

    Raises ArtifactError naming what llama.cpp has no name for: served text would be split otherwise than in training.
    """
    if not tokenizer_json.exists() and tokenizer_json.with_name("tokenizer.model").exists():
        return ""
    tokenizer = read_json(tokenizer_json)
    model, splitter, normalizer = (tokenizer.get(part) or {} for part in ("model", "pre_tokenizer", "normalizer"))
    if model.get("byte_fallback") and "▁" in json.dumps([splitter, normalizer], ensure_ascii=False):
        return ""
    name = SPLITS.get(_patterns(splitter) or ())
    if model.get("type") != "BPE":
        problem = f"holds a {model.get('type')!r} model, not a BPE"
    elif name is None:
        problem = f"splits by {json.dumps(splitter, ensure_ascii=False)}"
    elif normalizer.get("type", "NFC") != "NFC":  # llama.cpp normalizes nothing; our texts are NFC as they are
        problem = f"changes the text first, by {json.dumps(normalizer, ensure_ascii=False)}"
    elif bool(model.get("ignore_merges")) != (name == "llama-bpe") and not _merges_make_all(tokenizer):
        problem = f"has ignore_merges {model.get('ignore_merges', False)}, and {name} means the contrary"
    else:
        return name
    raise ArtifactError(f"{tokenizer_json} {problem}", "llama.cpp has no name for that: use another base")


def _patterns(splitter: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What a byte-level pre-tokenizer splits by, step after step; None where it does anything else."""
    *steps, last = (splitter.get("pretokenizers") if splitter.get("type") == "Sequence" else [splitter]) or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    found = [_pattern(step) for step in steps] + ([GPT2] if last.get("use_regex", True) else [])
    return tuple(pattern for pattern in found if pattern) if None not in found else None


def _pattern(step: Mapping[str, Any]) -> str | None:
    if step.get("type") == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        regex = step.get("pattern", {}).get("Regex")
        return regex if isinstance(regex, str) else None
    return None


def _merges_make_all(tokenizer: Mapping[str, Any]) -> bool:
    """Whether merging makes every token from its characters: then it is the same with ignore_merges and without."""
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in tokenizer["model"]["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    return all(_is_made(token, ranks) for token in tokenizer["model"]["vocab"] if token not in added)


def _is_made(token: str, ranks: Mapping[tuple[str, str], int]) -> bool:
    parts = list(token)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == math.inf:
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True
