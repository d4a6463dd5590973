"""Every gate, tested by sabotage of other families and of the base's own template (test_sabotage.py has the rest).

    .venv/bin/pytest -s tests/end_to_end/test_family_sabotage.py     prints the table: sabotage -> gate -> message

Tiny models of the families go from base to GGUF without a training; each case spoils a copy of that. Ollama is the fake
server.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file
from support.fakes import ollama as fake
from support.models.family_chain import ROWS, Chain, family_chain
from support.models.gguf_edit import change_tensors, copy_gguf
from support.models.tiny_models import adapter_stage, edit, tensors
from support.outputs.sabotage import Report, printed_table

from tutor.engines.llamacpp import adapter
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.engines.ollama.client import connect
from tutor.errors import ArtifactError, DataError, GateError, TutorError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.encoding import Encoded, RowEncoder
from tutor.serving.builds import Model, publish_build
from tutor.stages.base.stage import facts_of
from tutor.stages.base.template import prompt_facts
from tutor.stages.base.tiny_templates import CHATML, HEADERS, SWITCHED, TURNS

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.llamacpp,
    pytest.mark.skipif(not is_built(build_folder()), reason="the pinned llama.cpp is not built"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
]

NAMES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""Tiny models, one a difference between families: permuted rows, biases, norms of heads, norms with an offset."""
CONVERT, PARITY = "convert: numbers", "parity: convert"
"""Gates of a changed GGUF: the comparison with merged/, and that of the answers where the first one is bypassed."""
Rows = "np.ndarray[Any, np.dtype[Any]]"


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """Collect rows of the table, which is printed after the last case."""
    yield from printed_table()


@pytest.fixture
def chain(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Callable[[str], Chain]:
    """Return a copy of a family's stages, to be spoiled."""
    return lambda name: family_chain(tmp_path_factory, name, NAMES, tmp_path)


def compared(chain: Chain, match: str) -> "pytest.ExceptionInfo[TutorError]":
    """Assert that the parity stage refuses; return its error as the runner raises it."""
    refused = chain.compare().get("refused")
    assert refused, "the parity stage refuses nothing"
    with pytest.raises(GateError, match=match) as caught:
        raise GateError(refused["message"], refused["hint"])
    return caught


@pytest.mark.parametrize("name", NAMES)
def test_untouched_family_passes_every_gate(chain: Callable[[str], Chain], name: str) -> None:
    made = chain(name)
    made.check_conversion()
    result = made.compare()
    assert {item["state"] for item in result["hand_offs"]} == {"same"}


# Weights in the GGUF


def interleaved(rows: Rows, heads: int) -> Rows:
    """Rows as the converter orders them: the two halves of each head in turn."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def in_halves(rows: Rows, heads: int) -> Rows:
    """Rows in the order of transformers: the reverse of `interleaved`."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


Q, Q_BIAS, NORM = "blk.0.attn_q.weight", "blk.0.attn_q.bias", "blk.0.attn_norm.weight"
Q_NORM, K_NORM = "blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"
SPOILT: dict[str, tuple[str, Callable[[dict[str, Rows]], dict[str, Rows]]]] = {
    "rows of q not permuted": ("llama", lambda held: {Q: in_halves(held[Q], 4)}),
    "rows of q permuted": ("qwen2", lambda held: {Q: interleaved(held[Q], 4)}),
    "bias of q dropped": ("qwen2", lambda held: {Q_BIAS: 0 * held[Q_BIAS]}),
    "norms of q and k swapped": ("qwen3", lambda held: {Q_NORM: held[K_NORM], K_NORM: held[Q_NORM]}),
    "a norm without its +1": ("gemma3_text", lambda held: {NORM: held[NORM] - 1}),
}
"""What is broken: the family, and the changed tensors."""


@pytest.mark.parametrize("what", SPOILT)
def test_wrong_weights_in_gguf_are_refused_twice(chain: Callable[[str], Chain], report: Report, what: str) -> None:
    name, change = SPOILT[what]
    made = chain(name)
    change_tensors(made.gguf, change)
    with pytest.raises(
        ArtifactError, match=r"differs from its source: blk\.0\.attn_.* has other numbers than"
    ) as early:
        made.check_conversion()
    report(f"{name}: {what}", CONVERT, early)
    late = compared(made, rf"merged -> {made.reference} \(convert\) diverges in its log-probabilities")
    report(f"{name}: {what}", PARITY, late)


@pytest.mark.parametrize(("name", "tensor"), [("qwen2", Q_BIAS), ("qwen3", K_NORM)])
def test_tensor_missing_in_gguf_is_refused_by_convert(
    chain: Callable[[str], Chain], report: Report, name: str, tensor: str
) -> None:
    made = chain(name)
    copy_gguf(made.gguf, drop=(tensor,))
    with pytest.raises(ArtifactError, match="tensors: expected") as caught:
        made.check_conversion()
    report(f"{name}: no {tensor} in the GGUF", "convert: GGUF read-back", caught)


def test_another_sliding_window_is_refused(chain: Callable[[str], Chain], report: Report) -> None:
    made = chain("gemma3_text")
    copy_gguf(made.gguf, {"gemma3.attention.sliding_window": 64})
    with pytest.raises(ArtifactError, match="window: expected 8, found 64") as caught:
        made.check_conversion()
    report("gemma3_text: another sliding window in the GGUF", "convert: GGUF read-back", caught)
    late = compared(made, r"merged -> BF16 \(convert\) diverges in its log-probabilities")
    report("gemma3_text: another sliding window in the GGUF", PARITY, late)


def test_sliding_window_ignored_in_merged_is_refused(chain: Callable[[str], Chain], report: Report) -> None:
    made = chain("gemma3_text")
    edit(made.merged / "config.json", sliding_window=512)
    late = compared(made, r"base \+ adapter -> merged \(merge\) diverges in its log-probabilities")
    report("gemma3_text: another sliding window in merged/", "parity: merge", late)


# The end of a turn


def test_eos_of_the_base_in_gguf_is_refused(chain: Callable[[str], Chain], report: Report) -> None:
    made = chain("llama")
    eos = load_tokenizer(made.base).eos_token_id
    assert eos != made.prompt.end_id
    copy_gguf(made.gguf, {"tokenizer.ggml.eos_token_id": eos})
    with pytest.raises(ArtifactError, match=f"eos: expected {made.prompt.end_id}, found {eos}") as caught:
        made.check_conversion()
    report("llama: the base's EOS in the GGUF, not the end of a turn", "convert: GGUF read-back", caught)


def audited(made: Chain, change: Callable[[Encoded], Encoded]) -> "pytest.ExceptionInfo[TutorError]":
    """Assert that the label audit refuses rows that the trainer has changed; its message ends with the reason."""
    from datasets import Dataset

    from tutor.stages.train.audit import audit_labels, label_ids

    tokenizer, prompt = load_tokenizer(made.base), made.prompt
    rows = [row for source in ROWS for row in RowEncoder(tokenizer, prompt).encode(source)]

    def collate(items: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        (item,) = items
        ids = torch.tensor([item["input_ids"]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([item["labels"]])}

    data = Dataset.from_list([{"input_ids": row.ids, "labels": label_ids(row)} for row in map(change, rows)])
    args = SimpleNamespace(per_device_train_batch_size=1)
    trainer: Any = SimpleNamespace(train_dataset=data, data_collator=collate, args=args)
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows, tokenizer, prompt)
    caught.value.message += f" ({caught.value.problems[0]})"
    return caught


def test_row_with_another_end_is_refused_by_the_label_audit(chain: Callable[[str], Chain], report: Report) -> None:
    made = chain("llama")
    eos = load_tokenizer(made.base).eos_token_id
    caught = audited(made, lambda row: Encoded([*row.ids[:-1], eos], row.mask))
    assert "EOS is not supervised at the end" in caught.value.message
    report("llama: rows end with the base's EOS, not the end of a turn", "train: label audit", caught)


def test_loss_on_the_users_turn_is_refused_by_the_label_audit(chain: Callable[[str], Chain], report: Report) -> None:
    caught = audited(
        chain("qwen2"), lambda row: Encoded(row.ids, [int(at >= row.n_prompt) for at in range(len(row.ids))])
    )
    assert "train row 1: EOS is supervised more than once" in caught.value.message
    report("qwen2: loss on the user's turn", "train: label audit", caught)


def test_end_of_turn_that_was_never_trained_is_refused(chain: Callable[[str], Chain], report: Report) -> None:
    made = chain("llama")
    weights = tensors(made.base)
    weights["lm_head.weight"][made.prompt.end_id] = 0
    save_file(weights, made.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"was never trained on <\|eot_id\|>.*norm of row \d+ is 0") as caught:
        prompt_facts(made.recipe, made.base, facts_of(made.base, "path:model", "model"))
    report("llama: the row of the end of a turn is zero", "base: end of a turn", caught)


# Templates and thoughts


def test_template_of_another_family_in_merged_is_refused(chain: Callable[[str], Chain], report: Report) -> None:
    made = chain("qwen2")
    (made.merged / "chat_template.jinja").write_text(TURNS, "utf-8")
    edit(made.merged / "tokenizer_config.json", chat_template=TURNS)
    caught = compared(made, r"base \+ adapter -> merged \(merge\) diverges in its prompt")
    report("qwen2: Gemma's template in merged/", "parity: merge", caught)


@pytest.mark.parametrize(
    ("name", "what", "template"),
    [("llama", "Qwen's template", CHATML), ("qwen3", "a template whose switch of thoughts is not fixed", SWITCHED)],
)
def test_another_template_in_gguf_is_refused(
    chain: Callable[[str], Chain], report: Report, name: str, what: str, template: str
) -> None:
    made = chain(name)
    copy_gguf(made.gguf, {"tokenizer.chat_template": template})
    with pytest.raises(ArtifactError, match="chat_template: expected") as early:
        made.check_conversion()
    report(f"{name}: {what} in the GGUF", "convert: GGUF read-back", early)
    late = compared(made, r"merged -> F16 \(convert\) diverges in its prompt")
    report(f"{name}: {what} in the GGUF", "parity: convert", late)


def test_rows_with_thoughts_served_without_are_refused(chain: Callable[[str], Chain], report: Report) -> None:
    """base.json has the format of a training with thoughts, and the recipe serves without."""
    made = chain("qwen3")
    facts = json.loads((made.inputs["base"] / "base.json").read_text("utf-8"))
    edit(made.inputs["base"] / "base.json", prompt={**facts["prompt"], "reasoning": "rows"})
    with pytest.raises(ArtifactError, match="is of another prompt or reasoning than") as caught:
        made.compare()
    report("qwen3: trained with thoughts, served without", "every stage: base.json", caught)


def test_rslora_with_the_alpha_of_a_lora_is_refused(
    chain: Callable[[str], Chain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    """The converter gets the adapter as PEFT wrote it, and copies its alpha."""
    made = chain("qwen2")
    adapter_stage(made.base, tmp_path / "adapter", "", use_rslora=True)
    alpha = 8 * 4**0.5
    monkeypatch.setattr(adapter, "_as_lora", lambda folder, _: nullcontext((folder, alpha)))
    with pytest.raises(ArtifactError, match=r"has alpha 8, and .* 16") as caught:
        adapter.lora_to_gguf(tmp_path / "adapter", made.base, made.gguf, tmp_path / "lora.gguf")
    assert not list(tmp_path.glob("lora.gguf*"))
    report("qwen2: an rsLoRA's GGUF with the alpha of a LoRA", "publish --adapter: alpha", caught)


# Publishing


def refused_by_ollama(
    prompt: BaseFormat, template: str, folder: Path, match: str, family: str = "llama"
) -> "pytest.ExceptionInfo[TutorError]":
    """Assert that a model with `template` in its GGUF is refused and leaves no name; return the error.

    `family` is that of the GGUF; a Llama is expected.
    """
    path = folder / "model.gguf"
    sha256 = fake.write_gguf(path, chat_template=template, family=family)
    model = Model("tutor", "Q8_0", {path.name: path}, {}, {}, prompt, own_template=template)
    with fake.running() as running, connect(running.host) as server:
        with pytest.raises(GateError, match=match) as caught:
            publish_build(model, {path: sha256}, server)
        assert running.models == {}
    return caught


def test_another_familys_template_is_not_published(
    chain: Callable[[str], Chain], tmp_path: Path, report: Report
) -> None:
    prompt = chain("qwen2").prompt
    caught = refused_by_ollama(prompt, HEADERS, tmp_path, "gets another prompt than in training: /api/chat")
    report("qwen2: Llama's template in the GGUF, before publishing", "publish: rendered prompts", caught)


def test_template_that_ollama_chose_itself_is_not_published(
    chain: Callable[[str], Chain], tmp_path: Path, report: Report
) -> None:
    known = fake.KNOWN["chatml"][0]
    prompt = replace(chain("qwen2").prompt, template=known)
    caught = refused_by_ollama(prompt, known, tmp_path, "is not what was sent: template is .*range .Messages")
    assert "took it for 'chatml'" in str(caught.value)
    report("qwen2: Ollama chose a template of its own", "publish: /api/show", caught)


def test_think_block_too_many_is_not_published(chain: Callable[[str], Chain], tmp_path: Path, report: Report) -> None:
    """A server sets a switch that is not fixed as a request says, and to true without."""
    made = chain("qwen3")
    served = made.prompt.chat_template(add_bos=False)
    caught = refused_by_ollama(made.prompt, SWITCHED, tmp_path, "gets another prompt than in training: /api/chat")
    report("qwen3: trained with an empty thought, served with none", "publish: rendered prompts", caught)
    thinking = made.recipe.model_copy(update={"reasoning": "rows"})
    facts = prompt_facts(thinking, made.base, facts_of(made.base, "path:model", "model"))
    caught = refused_by_ollama(BaseFormat.from_json(facts), served, tmp_path, "gets another prompt than in training")
    report("qwen3: trained with thoughts, served with an empty one", "publish: rendered prompts", caught)


def test_gguf_of_another_family_is_not_published(chain: Callable[[str], Chain], tmp_path: Path, report: Report) -> None:
    prompt = chain("qwen2").prompt
    template = prompt.chat_template(add_bos=False)
    match = "family is 'qwen2' instead of 'llama'"
    caught = refused_by_ollama(prompt, template, tmp_path, match, family="qwen2")
    report("the GGUF of another family", "publish: /api/show", caught)
