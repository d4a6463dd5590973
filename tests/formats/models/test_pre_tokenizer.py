"""formats/models/pre_tokenizer.py: the name that llama.cpp has for a tokenizer.json's splitting."""

import json
from pathlib import Path
from typing import Any

import pytest

from tutor.errors import ArtifactError
from tutor.formats.models.pre_tokenizer import GPT2, LLAMA3, pre_tokenizer_name

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTES = {**BYTES, "use_regex": True}


def splits(*patterns: str) -> dict[str, Any]:
    step = {"type": "Split", "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [*({**step, "pattern": {"Regex": item}} for item in patterns), BYTES]}


def digits(*, individual: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": individual}, GPT2_BYTES]}


def tokenizer_json(path: Path, splitter: Any, **other: Any) -> Path:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]} | other.pop(
        "model", {}
    )
    tokenizer = {"added_tokens": [{"id": 3, "content": "<s>"}], "normalizer": None, "pre_tokenizer": splitter}
    path.write_text(json.dumps({**tokenizer, "model": model, **other}), "utf-8")
    return path


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (splits(LLAMA3), "llama-bpe"),
        (splits(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), "qwen2"),
        (GPT2_BYTES, "gpt-2"),
        (splits(GPT2), "gpt-2"),
        (digits(individual=True), "smollm"),
    ],
)
def test_known_splitting_returns_llama_cpp_name(tmp_path: Path, splitter: Any, name: str) -> None:
    assert pre_tokenizer_name(tokenizer_json(tmp_path / "t.json", splitter)) == name


@pytest.mark.parametrize(
    ("splitter", "other", "what"),
    [
        (splits(LLAMA3 + "|x"), {}, r"\|x"),
        (splits(LLAMA3, LLAMA3), {}, "splits by"),
        (BYTES, {}, "splits by"),
        (None, {}, "splits by"),
        ({"type": "Whitespace"}, {}, "Whitespace"),
        ({**GPT2_BYTES, "add_prefix_space": True}, {}, "add_prefix_space"),
        ({"type": "ByteLevel"}, {}, "splits by"),
        (digits(individual=False), {}, "Digits"),
        ({**splits(LLAMA3), "pretokenizers": splits(LLAMA3)["pretokenizers"][:1]}, {}, "splits by"),
        (splits(LLAMA3), {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        (splits(LLAMA3), {"model": {"type": "WordPiece"}}, "WordPiece"),
        (splits(LLAMA3), {"model": {"merges": []}}, "ignore_merges False"),
        (GPT2_BYTES, {"model": {"merges": [], "ignore_merges": True}}, "ignore_merges True"),
    ],
)
def test_unknown_splitting_is_refused_with_its_form(
    tmp_path: Path, splitter: Any, other: dict[str, Any], what: str
) -> None:
    with pytest.raises(ArtifactError, match=what) as raised:
        pre_tokenizer_name(tokenizer_json(tmp_path / "t.json", splitter, **other))
    assert raised.value.code == 5


def test_llama3_tokenizer_ignoring_merges_is_accepted(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path / "t.json", splits(LLAMA3), model={"merges": [], "ignore_merges": True})
    assert pre_tokenizer_name(path) == "llama-bpe"


@pytest.mark.parametrize(
    ("splitter", "normalizer"),
    [
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, None),
        (None, {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}),
    ],
)
def test_sentencepiece_tokenizer_has_no_pre_tokenizer(tmp_path: Path, splitter: Any, normalizer: Any) -> None:
    path = tokenizer_json(tmp_path / "t.json", splitter, normalizer=normalizer, model={"byte_fallback": True})
    assert pre_tokenizer_name(path) == ""


def test_folder_without_tokenizer_json_has_no_pre_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    assert pre_tokenizer_name(tmp_path / "tokenizer.json") == ""
