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
from tutor.prompt.encoding import adds_bos, continuation_ids
from tutor.prompt.format import PromptFormat, end_token
from tutor.prompt.tutor_format import TUTOR
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
    prompt: str
    ids: tuple[int, ...]  # of the prompt
    answer: tuple[int, ...] | None  # of the given answer, its end last


def tokenize(tokenizer: Any, conversation: Conversation, prompt: PromptFormat = TUTOR) -> Tokenized:
    """Return the prompt and its ids, and those of the answer and its end, encoded as in training."""
    text = conversation.prompt(prompt)
    ids = tuple(tokenizer(text)["input_ids"])
    if conversation.answer is None:
        return Tokenized(conversation, text, ids, None)
    answer = continuation_ids(tokenizer, prompt.completion(conversation.answer))
    end = end_token(prompt, tokenizer)
    assert end is not None, "the base stage refuses a base without an end"
    return Tokenized(conversation, text, ids, (*answer, end))


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

    items = [tokenize(engine.tokenizer, conversation, engine.prompt) for conversation in conversations]
    given = _given(items)
    scored = dict(zip(given, scores(engine, list(given.values())), strict=True))
    found = []
    for item in items:
        conversation, name = item.conversation, item.conversation.name
        answer = trace_along(engine, item.ids, paths[name]) if conversation.reach == "everywhere" else None
        prompt = own_prompt(engine, conversation) if own_template else item.prompt
        found.append(Observation(name, prompt, item.ids, len(item.ids), scored.get(name), answer))
    return tuple(found)


def own_prompt(engine: "TransformersEngine", conversation: Conversation) -> str:
    """Return a conversation rendered by the folder's chat template, without a BOS that the tokenizer adds."""
    messages = [dict(message) for message in conversation.messages]
    text = str(engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(engine.tokenizer.bos_token or "") if adds_bos(engine.tokenizer) else text


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
            ids = tuple(server.tokenize(item.prompt))
            if conversation.reach in reaches:
                paths[name], answer = llamacpp_trace(server, item.prompt, GREEDY_TOKENS)
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
