"""llama.cpp's name for how a tokenizer splits text before it merges.

In: tokenizer.json. Out: the value of `tokenizer.ggml.pre`. Tokenizes nothing.
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Pattern of GPT-2's pre-tokenizer."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern of Llama 3's pre-tokenizer."""
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern of Mistral's pre-tokenizer since Tekken."""
DIGIT = r"\p{N}"
"""Pattern of a step that makes a part of each digit."""
SPLITS: dict[tuple[str, ...], str] = {
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
    (TEKKEN,): "tekken",
    (GPT2,): "gpt-2",
    (DIGIT, GPT2): "smollm",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT): "deepseek-coder",
}
"""llama.cpp's name by the patterns of its src/llama-vocab.cpp, applied in order, written as in tokenizer.json."""

IGNORE_MERGES = ("llama-bpe", "tekken")
"""Names with which llama.cpp takes a word that is a token as that token, without merging."""
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
"""Other names of the same patterns; the converter may give a tokenizer one of them."""


def equivalent_names(name: str) -> tuple[str, ...]:
    """Return a name and all other names of the same splitting."""
    return (name, *SAME_SPLIT.get(name, ()))


def ignores_merges(name: str | None) -> bool:
    """Return whether llama.cpp takes a word that is a token as that token, without merging."""
    return any(name in equivalent_names(known) for known in IGNORE_MERGES)


def is_sentencepiece(tokenizer_json: Path) -> bool:
    """Return whether a folder's tokenizer is of SentencePiece: marks for blanks, and bytes as tokens of their own."""
    if not tokenizer_json.exists():
        return tokenizer_json.with_name("tokenizer.model").exists()
    tokenizer = read_json(tokenizer_json)
    model, marks = tokenizer.get("model"), [tokenizer.get(part) for part in ("pre_tokenizer", "normalizer")]
    has_bytes = isinstance(model, dict) and bool(model.get("byte_fallback"))
    return has_bytes and "▁" in json.dumps(marks, ensure_ascii=False)


def pre_tokenizer_name(tokenizer_json: Path) -> str:
    """Return llama.cpp's name for how a byte-level BPE splits text before merging; "" for SentencePiece.

    Raises ArtifactError with the splitting that llama.cpp has no name for: it would split text unlike training.
    """
    if is_sentencepiece(tokenizer_json):
        return ""
    tokenizer = read_json(tokenizer_json)
    model, splitter, normalizer = (tokenizer.get(part) or {} for part in ("model", "pre_tokenizer", "normalizer"))
    name = SPLITS.get(_patterns(splitter) or ())
    if model.get("type") != "BPE":
        problem = f"holds a {model.get('type')!r} model, not a BPE"
    elif name is None:
        problem = f"splits by {json.dumps(splitter, ensure_ascii=False)}"
    elif normalizer.get("type", "NFC") != "NFC":  # llama.cpp does not normalize; the rows are NFC already
        problem = f"changes the text first, by {json.dumps(normalizer, ensure_ascii=False)}"
    elif bool(model.get("ignore_merges")) != (name in IGNORE_MERGES) and not _merges_produce_all(tokenizer):
        problem = f"has ignore_merges {model.get('ignore_merges', False)}, and {name} means the contrary"
    else:
        return name
    raise ArtifactError(f"{tokenizer_json} {problem}", "llama.cpp has no name for that: use another base")


def splitter_of(name: str) -> "PreTokenizer | None":
    """Return the pre-tokenizer of llama.cpp's name for a splitting; None for a name that is not known."""
    from tokenizers import Regex, pre_tokenizers

    patterns = next((each for each, known in SPLITS.items() if name in equivalent_names(known)), None)
    if patterns is None:
        return None
    own = patterns[-1] == GPT2  # the one that ByteLevel applies itself
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in patterns[: len(patterns) - own]
    ]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)])


def _patterns(splitter: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns of a byte-level pre-tokenizer, step by step; None where a step does anything but split."""
    *steps, last = (splitter.get("pretokenizers") if splitter.get("type") == "Sequence" else [splitter]) or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    found = [_pattern(step) for step in steps] + ([GPT2] if last.get("use_regex", True) else [])
    return tuple(pattern for pattern in found if pattern) if None not in found else None


def _pattern(step: Mapping[str, Any]) -> str | None:
    if step.get("type") == "Digits":
        return DIGIT if step.get("individual_digits") else r"\p{N}+"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        regex = step.get("pattern", {}).get("Regex")
        return regex if isinstance(regex, str) else None
    return None


def _merges_produce_all(tokenizer: Mapping[str, Any]) -> bool:
    """Whether merging produces every token from its characters: ignore_merges then has no effect."""
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in tokenizer["model"]["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    return all(_is_merged(token, ranks) for token in tokenizer["model"]["vocab"] if token not in added)


def _is_merged(token: str, ranks: Mapping[tuple[str, str], int]) -> bool:
    parts = list(token)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == math.inf:
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True
