"""Fixtures of the tests of transformers as an engine: a model with known answers, its engine, an adapter."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from support.models.learnt_model import ENDS, RUNS_ON, bytes_tokenizer, learn_by_heart
from transformers import LlamaConfig, LlamaForCausalLM

from tutor.engines.hf.engine import TransformersEngine
from tutor.engines.hf.loading import load
from tutor.prompt.encoding import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with sampling settings in its generation_config.json, like those of published chat models."""
    out = tmp_path_factory.mktemp("model")
    tokenizer = bytes_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    learn_by_heart(model, [encode(tokenizer, *pair) for pair in (ENDS, RUNS_ON)])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    wild = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 5.0, "max_length": 3}
    (out / "generation_config.json").write_text(json.dumps(wild), "utf-8")
    return out


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return load(folder, None, quantization="none", precision="fp32")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    base = LlamaForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, config).save_pretrained(out)
    return out
