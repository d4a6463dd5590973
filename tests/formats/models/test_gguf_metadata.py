"""formats/models/gguf_metadata.py: the metadata of a GGUF against the values that its model folder implies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.models.gguf_bytes import facts, whole

from tutor.errors import ArtifactError
from tutor.formats.models.gguf import Gguf, Tensor
from tutor.formats.models.gguf_metadata import (
    check_gguf,
    count_fallbacks,
    implied_metadata,
    metadata_differences,
    metadata_of,
)
from tutor.prompt.tutor_format import chat_template

FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": chat_template(add_bos=True),
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.rope.freq_base": 500000.0,
}


TENSORS = {"token_embd.weight": Tensor("Q4_K", (256, 3)), "rope_freqs.weight": Tensor("F32", (8,))}


EXPECTED = metadata_of(Gguf(FIELDS, TENSORS))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in FIELDS.items() if key != name}


@pytest.mark.parametrize(
    ("fields", "tensors", "line"),
    [
        ({**FIELDS, "general.architecture": "qwen2"}, TENSORS, "architecture: expected 'llama', found 'qwen2'"),
        ({**FIELDS, "general.file_type": 7}, TENSORS, "file_type: expected 'Q4_K_M', found 'Q8_0'"),
        ({**FIELDS, "general.file_type": 4711}, TENSORS, "file_type: expected 'Q4_K_M', found 'type 4711'"),
        ({**FIELDS, "tokenizer.ggml.tokens": ["a"]}, TENSORS, "vocabulary: expected 3, found 1"),
        ({**FIELDS, "tokenizer.ggml.eos_token_id": 0}, TENSORS, "eos: expected 1, found 0"),
        (without("tokenizer.ggml.eos_token_id"), TENSORS, "eos: expected 1, found None"),
        ({**FIELDS, "tokenizer.ggml.pre": "default"}, TENSORS, "pre_tokenizer: expected 'llama-bpe', found 'default'"),
        ({**FIELDS, "tokenizer.ggml.model": "llama"}, TENSORS, "pre_tokenizer: expected 'llama-bpe', found ''"),
        ({**FIELDS, "tokenizer.ggml.add_bos_token": False}, TENSORS, "add_bos: expected True, found False"),
        (without("tokenizer.ggml.add_bos_token"), TENSORS, "add_bos: expected True, found None"),
        ({**FIELDS, "llama.context_length": 2048}, TENSORS, "context: expected 512, found 2048"),
        ({**FIELDS, "llama.block_count": 1}, TENSORS, "blocks: expected 2, found 1"),
        (without("llama.rope.freq_base"), TENSORS, "rope_base: expected 500000.0, found 10000.0"),
        (FIELDS, {"token_embd.weight": Tensor("Q4_K", (256, 3))}, "rope_factors: expected True, found False"),
        (FIELDS, {**TENSORS, "token_embd.weight": Tensor("Q4_K", (256, 4))}, "embedding_rows: expected 3, found 4"),
        (FIELDS, {**TENSORS, "extra.weight": Tensor("F32", (8,))}, "tensors: expected 2, found 3"),
        ({**FIELDS, "tokenizer.chat_template": "{{ tools }}"}, TENSORS, "chat_template: expected "),
    ],
)
def test_each_different_value_gives_its_own_line(fields: dict[str, Any], tensors: dict[str, Tensor], line: str) -> None:
    lines = metadata_differences(EXPECTED, metadata_of(Gguf(fields, tensors)))
    assert [found for found in lines if found.startswith(line)]


def test_expected_metadata_has_no_differences() -> None:
    assert metadata_differences(EXPECTED, metadata_of(Gguf(dict(FIELDS), dict(TENSORS)))) == []


def test_pre_tokenizer_alias_has_no_difference() -> None:
    fields = {**FIELDS, "tokenizer.ggml.pre": "falcon3"}
    assert metadata_differences(EXPECTED, metadata_of(Gguf(fields, TENSORS))) == []


def test_base_chat_template_is_not_compared() -> None:
    fields = {**FIELDS, "tokenizer.chat_template": "{{ tools }}"}
    expected = replace(EXPECTED, chat_template=None)
    assert metadata_differences(expected, metadata_of(Gguf(fields, TENSORS))) == []


def test_gpt2_pre_tokenizer_without_bos_key_adds_no_bos() -> None:
    fields = {**without("tokenizer.ggml.add_bos_token"), "tokenizer.ggml.pre": "gpt-2"}
    assert metadata_of(Gguf(fields, TENSORS)).add_bos is False


def test_all_differences_are_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(whole())
    with pytest.raises(ArtifactError) as raised:
        check_gguf(tmp_path / "a.gguf", EXPECTED)
    messages = str(raised.value).split("\n  ")
    assert "a.gguf" in messages[0]
    assert len(messages) > 8


@pytest.mark.parametrize(
    ("kind", "types", "count"),
    [
        ("Q4_K_M", ["Q4_K", "Q6_K", "F32"], 0),
        ("Q4_K_M", ["Q5_0", "Q8_0", "Q6_K"], 2),
        ("Q6_K", ["Q6_K", "Q8_0"], 1),
        ("Q8_0", ["Q8_0", "F16"], 1),
        ("Q5_0", ["Q5_0", "Q8_0"], 1),
        ("F16", ["F16", "F32"], 0),
    ],
)
def test_matrices_of_a_fallback_type_are_counted(kind: str, types: list[str], count: int) -> None:
    tensors = {str(n): Tensor(item, (32, 2) if item != "F32" else (32,)) for n, item in enumerate(types)}
    tensors["token_embd.weight"] = tensors["output.weight"] = Tensor("Q8_0", (32, 2))
    assert count_fallbacks(Gguf({}, tensors), kind) == count


def folder(path: Path, weights: dict[str, Any] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    settings = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 512, "rope_theta": 1e6}
    settings |= {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 3}
    (path / "tokenizer_config.json").write_text("{}", "utf-8")
    (path / "config.json").write_text(json.dumps({**settings, **config}), "utf-8")
    given = {"model.embed_tokens.weight": np.zeros((3, 8), np.float16), "model.norm.weight": np.zeros(8, np.float16)}
    save_file(given if weights is None else weights, path / "model.safetensors")
    return path


def test_model_folder_implies_metadata(tmp_path: Path) -> None:
    expected = implied_metadata(folder(tmp_path / "m", pad_token_id=2), facts())
    assert (expected.embedding_rows, expected.blocks, expected.context, expected.tensors) == (3, 2, 512, 2)
    assert (expected.rope_base, expected.rope_factors) == (1e6, False)
    assert (expected.bos, expected.eos, expected.pad) == (0, 1, 2)
    assert (expected.file_type, expected.pre_tokenizer) == ("F16", "llama-bpe")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}},
    ],
)
def test_llama3_rope_scaling_is_found_in_every_config_form(tmp_path: Path, rope: dict[str, Any]) -> None:
    expected = implied_metadata(folder(tmp_path / "m", **rope), facts())
    assert (expected.rope_base, expected.rope_factors, expected.tensors) == (5e5, True, 3)


def test_four_bit_weights_are_refused(tmp_path: Path) -> None:
    packed = {"model.layers.0.self_attn.q_proj.weight": np.zeros((32, 1), np.uint8)}
    with pytest.raises(
        ArtifactError, match=r"q_proj.weight is U8, no 16-bit weight; .*already quantized.*needs one in FP16/FP32"
    ):
        implied_metadata(folder(tmp_path / "m", packed), facts())


def test_quantization_config_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ArtifactError, match="already quantized"):
        implied_metadata(model, facts())


def test_missing_shard_raises_artifact_error(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ArtifactError, match="lacks model-00002-of-00002"):
        implied_metadata(model, facts())


def test_damaged_weights_raise_artifact_error(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        implied_metadata(model, facts())


def test_folder_without_embedding_names_the_missing_weight(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"lacks 'model\.embed_tokens\.weight'"):
        implied_metadata(folder(tmp_path / "m", {"a": np.zeros(2, np.float16)}), facts())
