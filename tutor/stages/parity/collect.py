"""Collect the observations of transformers and of llama.cpp for the parity gate's conversations.

In: model folders, GGUF files, conversations. Out: one `Observation` a conversation, in their order. Compares nothing.
Imports torch only where transformers runs.
"""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.engines.llamacpp.score import score
from tutor.engines.llamacpp.server import serve
from tutor.engines.llamacpp.trace import rendered
from tutor.engines.llamacpp.trace import trace as llamacpp_trace
from tutor.engines.trace import TOP_CANDIDATES
from tutor.prompt.tutor_format import completion
from tutor.stages.parity.compare import Observation
from tutor.stages.parity.conversations import Conversation

if TYPE_CHECKING:
    from tutor.engines.hf.engine import TransformersEngine

log = logging.getLogger(__name__)

GREEDY_TOKENS = 16
"""Number of tokens of a greedy answer: enough to diverge, and fewer than the repetitions at which Ollama stops."""


@dataclass(frozen=True)
class Tokenized:
    """A conversation as ids of the model folder's tokenizer."""

    conversation: Conversation
    ids: tuple[int, ...]  # of the prompt
    answer: tuple[int, ...] | None  # of the given answer, EOS last


def tokenize(tokenizer: Any, conversation: Conversation) -> Tokenized:
    """Return the ids of the prompt, and those of the answer and EOS, encoded as in training."""
    ids = tuple(tokenizer(conversation.prompt)["input_ids"])
    if conversation.answer is None:
        return Tokenized(conversation, ids, None)
    answer = tokenizer(completion(conversation.answer), add_special_tokens=False)["input_ids"]
    return Tokenized(conversation, ids, (*answer, tokenizer.eos_token_id))


def from_transformers(
    engine: "TransformersEngine",
    conversations: Sequence[Conversation],
    paths: Mapping[str, Sequence[int]],
    *,
    own_template: bool,
) -> tuple[Observation, ...]:
    """Observe a loaded model.

    `own_template`: the folder's chat template renders the prompts; else the prompt contract does, because the folder of
    a base has another template. `paths`: greedy answers of a GGUF in llama.cpp; this model follows them up to its first
    different token, which is much faster than to generate.
    """
    from tutor.engines.hf.trace import scores, trace_along

    items = [tokenize(engine.tokenizer, conversation) for conversation in conversations]
    given = _given(items)
    scored = dict(zip(given, scores(engine, list(given.values())), strict=True))
    found = []
    for item in items:
        conversation, name = item.conversation, item.conversation.name
        answer = trace_along(engine, item.ids, paths[name]) if conversation.reach == "everywhere" else None
        prompt = own_prompt(engine.tokenizer, conversation) if own_template else conversation.prompt
        found.append(Observation(name, prompt, item.ids, len(item.ids), scored.get(name), answer))
    return tuple(found)


def own_prompt(tokenizer: Any, conversation: Conversation) -> str:
    """Return a conversation rendered by the folder's chat template, without the BOS that the template may write."""
    messages = [dict(message) for message in conversation.messages]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text.removeprefix(tokenizer.bos_token or "")


def _given(items: Sequence[Tokenized]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and answer ids of the conversations that have a given answer, by name."""
    return {item.conversation.name: (item.ids, item.answer) for item in items if item.answer is not None}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of llama-server."""

    context: int
    threads: int
    log: Path
    bos: str  # BOS text that a template may write: llama-server keeps it where the file adds no BOS


@dataclass(frozen=True)
class GgufRun:
    """The observations of a GGUF file in llama.cpp, and the ids of its greedy answers."""

    observations: tuple[Observation, ...]
    paths: Mapping[str, Sequence[int]]


def from_gguf(gguf: Path, items: Sequence[Tokenized], settings: ServerSettings, *, served: bool) -> GgufRun:
    """Observe a GGUF file in llama.cpp, prompted by its own chat template; `served`: the file will be published."""
    given = _given(items)
    scored = dict(
        zip(given, score(gguf, list(given.values()), threads=settings.threads, top=TOP_CANDIDATES), strict=True)
    )
    found, paths = [], {}
    reaches = ("everywhere", "served") if served else ("everywhere",)
    with serve(gguf, context=settings.context, threads=settings.threads, log=settings.log, own_template=True) as server:
        for item in items:
            conversation, name, answer = item.conversation, item.conversation.name, None
            ids = tuple(server.tokenize(conversation.prompt))
            if conversation.reach in reaches:
                paths[name], answer = llamacpp_trace(server, conversation.prompt, GREEDY_TOKENS)
            prompt = rendered(server, conversation.messages).removeprefix(settings.bos)
            found.append(Observation(name, prompt, ids, len(ids), scored.get(name), answer))
    return GgufRun(tuple(found), paths)


def quantize_base_to_nf4(engine: "TransformersEngine", precision: str) -> None:
    """Replace the base's weights by those of 4-bit training: to NF4 with double quantization, and back."""
    from bitsandbytes import functional

    from tutor.engines.hf.loading import DTYPES

    for name, weight in engine.model.named_parameters():
        if ".layers." in name and weight.dim() == 2 and "lora_" not in name:
            codes, state = functional.quantize_4bit(
                weight.data.to(DTYPES[precision]), quant_type="nf4", compress_statistics=True
            )
            weight.data.copy_(functional.dequantize_4bit(codes, state))


def free_model(engine: "TransformersEngine") -> None:
    """Free the memory of a loaded model for the next one."""
    import torch

    engine.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
