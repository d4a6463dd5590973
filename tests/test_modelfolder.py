"""A base that cannot be tuned is refused by name, before anything is spent on it (faults.md T19-T21, M09)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import EOS, make_tokenizer

from tutor.errors import ArtifactError
from tutor.modelfolder import Facts, load_tokenizer, read_facts, read_json, refuse

LLAMA = {"model_type": "llama", "vocab_size": 8}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Make a model folder of files by name: objects as JSON, anything else as it is."""

    def make(**files: Any) -> Path:
        for name, value in {"config.json": LLAMA, "model.safetensors": b"", **files}.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return make


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_base_that_is_already_quantized_is_refused(folder, method):
    model = folder(**{"config.json": {**LLAMA, "quantization_config": {"quant_method": method}}})
    with pytest.raises(ArtifactError, match=rf"is already quantized \({method}\); the base must be 16-bit"):
        refuse(model)


def test_an_empty_quantization_config_is_none(folder):
    refuse(folder(**{"config.json": {**LLAMA, "quantization_config": None}}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**LLAMA, "auto_map": {"AutoModel": "x.Model"}}, "brings code of its own"),
        ({**LLAMA, "quantization_config": "gptq"}, r"already quantized \(gptq\)"),
        ({"model_type": "qwen2"}, "is a 'qwen2' model; tutor tunes Llamas"),
        ({}, "is a None model"),
        ([], r"config\.json is not a JSON object"),
        (b"{", r"config\.json is damaged"),
        (b"\xff", r"config\.json is damaged"),
        (b"[" * 100_000, r"config\.json is damaged"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, config, expected):
    with pytest.raises(ArtifactError, match=expected):
        refuse(folder(**{"config.json": config}))


def test_weights_that_can_run_code_are_refused(folder):
    model = folder(**{"pytorch_model.bin": b""})
    refuse(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"pickles \(pytorch_model\.bin\), which can run code"):
        refuse(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"holds no \*\.safetensors"):
        refuse(model)


def test_a_missing_shard_is_named(folder):
    wanted = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    model = folder(**{INDEX: {"weight_map": wanted}, wanted["a"]: b""})
    with pytest.raises(ArtifactError, match="lacks model-00002-of-00002.safetensors, which its index names"):
        refuse(model)
    with pytest.raises(ArtifactError, match="has no weight_map"):
        refuse(folder(**{INDEX: {}}))


def test_facts_come_back_with_the_folder_they_speak_of(tmp_path):
    facts = Facts("tiny", "model", "0" * 64, 8, add_bos=True, bos=0, eos=1, pad=None, pre_tokenizer="llama-bpe")
    (tmp_path / "base.json").write_text(json.dumps(asdict(facts)))
    assert read_facts(tmp_path) == (facts, tmp_path / "model")
    (tmp_path / "base.json").write_text(json.dumps({**asdict(facts), "model": "/elsewhere"}))
    assert read_facts(tmp_path)[1] == Path("/elsewhere")
    (tmp_path / "base.json").write_text(json.dumps({**asdict(facts), "more": 1}))
    with pytest.raises(ArtifactError, match="of another version; run: tutor base"):
        read_facts(tmp_path)
    (tmp_path / "base.json").unlink()
    with pytest.raises(ArtifactError, match=r"base\.json is missing"):
        read_facts(tmp_path)


# The tokenizer


def test_a_tokenizer_that_gives_every_text_back_is_loaded(tmp_path):
    make_tokenizer(add_bos=True).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == EOS


def test_a_tokenizer_that_loses_blanks_is_refused_with_what_came_back(tmp_path):
    """What transformers 5.3.0 to 5.21.1 made of an R1-Distill-Llama: every blank gone, and training ran on."""
    from tokenizers import pre_tokenizers

    made = make_tokenizer(add_bos=True)
    blind = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.backend_tokenizer.pre_tokenizer = blind
    made.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"does not give a text back: '¿Qué es .*' became '¿Quées"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_damaged_tokenizer_is_an_artifact_error(tmp_path, text):
    make_tokenizer(add_bos=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_read_json_of_nothing_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="is missing"):
        read_json(tmp_path / "none.json")
