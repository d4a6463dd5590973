"""Make the tiny Llama of the tests: one megabyte with all properties that make the real base difficult.

In: a text and a seed. Out: a model folder: a byte-level BPE with Llama 3's split pattern, R1's special tokens, the real
repository's misleading `tokenizer_class`, a chat template that names tools and `<think>`, grouped-query attention and
llama3 RoPE scaling. Trained on the text for seconds, so that an adapter can improve it and greedy answers are not one
repeated token. Does not answer questions.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tutor.formats.models.pre_tokenizer import LLAMA3

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIALS = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜▁pad▁｜>")
"""Special tokens of R1."""
VOCABULARY = 1024
"""Number of tokens of the tokenizer, special tokens included."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['tool_calls'] is defined %}{{ '<｜Assistant｜>' + message['tool_calls'] | tojson }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
"""Contradicts itself as R1's template does: it opens `<think>` for serving, and removes it for training."""

WARM_UP_STEPS = 160
"""Number of optimizer steps on the text."""
BATCH = 16
"""Number of windows in a step."""
LENGTH = 64
"""Number of tokens in a window."""


def make_tiny(folder: Path, text: str, seed: int) -> None:
    """Write the tiny model and its tokenizer into `folder`, in the form of a hub repository."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(text)
    tokenizer.save(str(folder / "tokenizer.json"))
    labels: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "legacy": True,
        "model_max_length": 2048,
        "pad_token": EOS,
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1), "utf-8")
    model = warm_up(_model(tokenizer.get_vocab_size(), seed), tokenizer.encode(text).ids, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters=scaling,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=vocabulary - len(SPECIALS),
        eos_token_id=vocabulary - len(SPECIALS) + 1,
    )
    return LlamaForCausalLM(config)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: on so small a model more are slower, and the order of additions would depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def warm_up(model: PreTrainedModel, ids: Sequence[int], seed: int) -> PreTrainedModel:
    """Train on random windows of the text, without rows, questions or EOS; return the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([*ids] * (1 + (LENGTH + 1) // len(ids)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(WARM_UP_STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
