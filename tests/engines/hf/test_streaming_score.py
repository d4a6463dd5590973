"""engines/hf/streaming_score.py and streamed_engine.py: log-probabilities equal to those of the loaded model."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models.families import FAMILIES, family_folder
from support.models.tiny_models import in_two_shards, tensors
from support.shared import copied
from support.tolerances import forward_error, largest_logit

torch = pytest.importorskip("torch")
from transformers import LlamaConfig, LlamaForCausalLM

from tutor.engines.hf import streaming_score
from tutor.engines.hf.loading import load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.prompt.encoding import encode

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ROWS = [([1, 2, 3], [4, 5]), ([7], [8]), ([250, 3, 250, 9, 11], [299, 0, 299]), ([*range(100)], [*range(60, 150)])]


def weights_of(model: Path, rows: int = 37) -> streaming_score.Weights:
    """Return a function that yields the folder's weights in pieces of the given rows."""
    held = tensors(model)

    def pieces(name: str) -> Iterator[Any]:
        return iter(held[name].split(rows))

    return pieces


def logprobs(model: Path, weights: streaming_score.Weights, rows: Any) -> list[list[float]]:
    """Return the log-probability of each answer's ids."""
    streamed = streaming_score.StreamedModel(model, weights, torch.device("cpu"))
    found = zip(streaming_score.logits_of_rows(streamed, rows), rows, strict=True)
    return [
        torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
        for logits, (_, answer) in found
    ]


def compare(model: Path, rows: Any) -> None:
    """Compare up to float32's rounding of sums in another order."""
    loaded = load_base(model, "none", "fp32")
    wanted = answer_logprobs(loaded, rows)
    found = logprobs(model, weights_of(model), rows)
    assert [len(row) for row in found] == [len(row) for row in wanted]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    bound = forward_error(loaded.config, longest) * largest_logit(loaded, rows)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=bound)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 20, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    ],
    ids=str,
)
def test_streamed_logprobs_equal_those_of_transformers(tmp_path: Path, settings: Any) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    compare(tmp_path, ROWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_logprobs_of_each_family_equal_transformers(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compare(family_folder(tmp_path_factory, name), ROWS)


def test_streamed_logprobs_with_scaled_rope_equal_transformers(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    rows = [encode(tokenizer, f"¿Qué es {word}?", f"Un {word}.") for word in ("número", "objeto")]
    model = in_two_shards(copied(tiny, tmp_path / "model"))
    compare(model, [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in rows])


def test_16_bit_pieces_are_computed_in_fp32(tiny: Path) -> None:
    held = {name: weight.half() for name, weight in tensors(tiny).items()}
    whole = logprobs(tiny, lambda name: iter([held[name]]), ROWS[:1])
    widened = logprobs(tiny, lambda name: iter([held[name].float()]), ROWS[:1])
    assert whole == widened


def test_each_layer_is_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logprobs(tiny, weights_of(tiny), ROWS[:1])
    assert [(record.done, record.total) for record in caplog.records if hasattr(record, "done")] == [(1, 2), (2, 2)]


@pytest.mark.pipeline
def test_streamed_logprobs_of_demo_model_equal_transformers(demo_base: Path) -> None:
    """A real model of 30 layers with tied embeddings."""
    _, model = read_facts(demo_base)
    tokenizer = load_tokenizer(model)
    text = encode(tokenizer, "What is a type in TypeScript?", "A type tells which values a variable can hold.")
    compare(model, [(text.ids[: text.n_prompt], text.ids[text.n_prompt :])])


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_streamed_logits_of_an_adapter_equal_those_of_peft(tmp_path: Path, variant: dict[str, bool]) -> None:
    peft = pytest.importorskip("peft")
    from tutor.engines.hf.streamed_engine import _weights

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.half().save_pretrained(tmp_path / "base")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "lora_dropout": 0.1}
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(task_type="CAUSAL_LM", **settings, **variant)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    cpu = torch.device("cpu")
    weights = _weights(tmp_path / "base", tmp_path / "adapter", cpu, None)
    streamed = streaming_score.StreamedModel(tmp_path / "base", weights, cpu, tmp_path / "adapter")
    bound = forward_error(loaded.config, 160) * largest_logit(adapted, ROWS)
    for (prompt, answer), found in zip(ROWS, streaming_score.logits_of_rows(streamed, ROWS), strict=True):
        with torch.no_grad():
            wanted = adapted(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            with adapted.disable_adapter():
                without = adapted(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert (found - wanted).abs().max() <= bound
        assert (found - without).abs().max() > 100 * bound, "the adapter changes the logits"
