"""stages/base/tiny_model.py: the properties of the tiny Llama."""

import json
import re
from pathlib import Path

import pytest
from support.models.tiny_models import spanish

pytest.importorskip("torch")
from support.fakes.ollama import CAPABILITY_WORDS

from tutor.formats.models.model_folder import CANARIES, load_tokenizer
from tutor.stages.base.tiny_model import make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.pipeline
def test_tiny_model_is_reproducible_by_seed(tiny: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "same", spanish(), 7)
    make_tiny(tmp_path / "other", spanish(), 8)
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()
    }
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


def test_tiny_model_has_the_real_bases_difficulties(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text("utf-8"))
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert config["rope_parameters"]["rope_theta"] == 500000.0
    labels = json.loads((tiny / "tokenizer_config.json").read_text("utf-8"))
    assert labels["tokenizer_class"] == "LlamaTokenizerFast"  # it is byte-level
    assert labels["pad_token"] == labels["eos_token"]
    assert "tool_calls" in labels["chat_template"]
    assert all(word in labels["chat_template"] for word in ("<think>", "</think>"))
    assert set(CAPABILITY_WORDS) & set(re.findall(r"tool_call|</?think>", labels["chat_template"]))
    assert not (tiny / "chat_template.jinja").exists()
    tokenizer = load_tokenizer(tiny)  # raises where a canary fails
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in CANARIES)
