"""What transformers and llama.cpp make of the parity gate's conversations.

In: model folders, GGUF files, conversations. Out: `Seen` of each, in the conversations' order. Judges nothing.
Imports torch only where transformers answers.
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
from tutor.engines.trace import TOP
from tutor.prompt import completion
from tutor.stages.parity.compare import Seen
from tutor.stages.parity.conversations import Conversation

if TYPE_CHECKING:
    from tutor.engines.hf.engine import TransformersEngine

log = logging.getLogger(__name__)

STEPS = 16
"""Tokens of a greedy answer: enough to part ways, and below the repetitions at which Ollama gives up on an answer."""


@dataclass(frozen=True)
class Read:
    """A conversation as the model folder's tokenizer reads it."""

    conversation: Conversation
    ids: tuple[int, ...]  # of the prompt
    answer: tuple[int, ...] | None  # of the given answer, EOS last


def read(tokenizer: Any, conversation: Conversation) -> Read:
    """Ids as training made them: the prompt's, then the answer's own and EOS."""
    ids = tuple(tokenizer(conversation.prompt)["input_ids"])
    if conversation.answer is None:
        return Read(conversation, ids, None)
    answer = tokenizer(completion(conversation.answer), add_special_tokens=False)["input_ids"]
    return Read(conversation, ids, (*answer, tokenizer.eos_token_id))


@dataclass(frozen=True)
class Answered:
    """What a model in transformers made of the conversations, and the ids of its greedy answers."""

    seen: tuple[Seen, ...]
    paths: Mapping[str, Sequence[int]]


def from_transformers(
    engine: "TransformersEngine",
    conversations: Sequence[Conversation],
    *,
    paths: Mapping[str, Sequence[int]] | None = None,
    own_template: bool,
) -> Answered:
    """A loaded model, prompted by its folder's own chat template or (the base, which has another one) as in training.

    It answers by itself or, where `paths` are given, as far as it follows these, in a fraction of the time.
    """
    from tutor.engines.hf.trace import followed, scores, trace

    reads = [read(engine.tokenizer, conversation) for conversation in conversations]
    given = _given(reads)
    scored = dict(zip(given, scores(engine, list(given.values())), strict=True))
    seen, taken = [], dict(paths or {})
    for item in reads:
        conversation, found = item.conversation, None
        name = conversation.name
        if paths is None and conversation.reach == "everywhere":
            taken[name], found = trace(engine, item.ids, STEPS)
        elif name in taken:
            found = followed(engine, item.ids, taken[name])
        prompt = own_prompt(engine.tokenizer, conversation) if own_template else conversation.prompt
        seen.append(Seen(name, prompt, item.ids, len(item.ids), scored.get(name), found))
    return Answered(tuple(seen), taken)


def own_prompt(tokenizer: Any, conversation: Conversation) -> str:
    """What a folder's chat template makes of a conversation, without the BOS that the template may write."""
    messages = [dict(message) for message in conversation.messages]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text.removeprefix(tokenizer.bos_token or "")


def _given(reads: Sequence[Read]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and answer ids of the conversations that have a given answer, by name."""
    return {item.conversation.name: (item.ids, item.answer) for item in reads if item.answer is not None}


@dataclass(frozen=True)
class Serving:
    """How llama-server is started."""

    context: int
    threads: int
    log: Path
    bos: str  # what a template may write for BOS: of a file that says it adds none, llama-server leaves it there


def from_gguf(gguf: Path, reads: Sequence[Read], serving: Serving, *, served: bool) -> tuple[Seen, ...]:
    """One GGUF file in llama.cpp, prompted by its own chat template; `served`: it is the one that will be published."""
    given = _given(reads)
    scored = dict(zip(given, score(gguf, list(given.values()), threads=serving.threads, top=TOP), strict=True))
    seen = []
    reaches = ("everywhere", "served") if served else ("everywhere",)
    with serve(gguf, context=serving.context, threads=serving.threads, log=serving.log, own_template=True) as server:
        for item in reads:
            conversation = item.conversation
            ids = tuple(server.tokenize(conversation.prompt))
            found = llamacpp_trace(server, conversation.prompt, STEPS) if conversation.reach in reaches else None
            prompt = rendered(server, conversation.messages).removeprefix(serving.bos)
            seen.append(Seen(conversation.name, prompt, ids, len(ids), scored.get(conversation.name), found))
    return tuple(seen)


def to_nf4_and_back(engine: "TransformersEngine", precision: str) -> None:
    """Give a loaded base the weights that training on it in 4 bits saw: NF4 with double quantization, and back."""
    from bitsandbytes import functional

    from tutor.engines.hf.loading import DTYPES

    for name, weight in engine.model.named_parameters():
        if ".layers." in name and weight.dim() == 2 and "lora_" not in name:
            codes, state = functional.quantize_4bit(
                weight.data.to(DTYPES[precision]), quant_type="nf4", compress_statistics=True
            )
            weight.data.copy_(functional.dequantize_4bit(codes, state))


def let_go(engine: "TransformersEngine") -> None:
    """Free a model's memory: the next one needs it."""
    import torch

    engine.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
