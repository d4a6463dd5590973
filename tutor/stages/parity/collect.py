"""Collect the observations of llama.cpp for the parity gate's conversations.

In: GGUF files, conversations and their ids. Out: one `Observation` a conversation, in their order. Compares nothing.
Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutor.engines.llamacpp.score import score
from tutor.engines.llamacpp.server import LlamaServer, serve
from tutor.engines.llamacpp.trace import rendered
from tutor.engines.llamacpp.trace import trace as llamacpp_trace
from tutor.engines.trace import TOP_CANDIDATES, Penalty, Trace
from tutor.prompt.encoding import continuation_ids
from tutor.prompt.format import PromptFormat, end_token
from tutor.prompt.tutor_format import TUTOR
from tutor.stages.parity.compare import Observation, departure
from tutor.stages.parity.conversations import Conversation
from tutor.stages.parity.gate import SAME_FILE

GREEDY_TOKENS = 16
"""Number of tokens of a greedy answer: enough to diverge, and fewer than the repetitions at which Ollama stops."""
OLLAMA_WINDOW = 64
"""Window of the repetition penalty in Ollama where a Modelfile sets none (api/types.go, repeat_last_n)."""


@dataclass(frozen=True)
class Tokenized:
    """A conversation as ids of the model folder's tokenizer."""

    conversation: Conversation
    prompt: str
    ids: tuple[int, ...]  # of the prompt
    answer: tuple[int, ...] | None  # of the given answer, its end last

    @property
    def name(self) -> str:
        """Name of the conversation."""
        return self.conversation.name

    def penalty(self, served: Penalty) -> Penalty | None:
        """The repetition penalty of its greedy answer: the one that is served, or none."""
        return served if self.conversation.penalised else None


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


def given_answers(items: Sequence[Tokenized]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and answer ids of the conversations that have a given answer, by name."""
    return {item.name: (item.ids, item.answer) for item in items if item.answer is not None}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of llama-server."""

    context: int
    threads: int
    log: Path
    bos: str  # BOS text that a template may write: llama-server keeps it where the file adds no BOS
    penalty: Penalty  # that is served


@dataclass(frozen=True)
class GgufRun:
    """The observations of a GGUF file in llama.cpp, and the ids of its greedy answers."""

    observations: tuple[Observation, ...]
    paths: Mapping[str, Sequence[int]]
    departs: Mapping[str, int | None]  # of the served file: as `_departs`


def from_gguf(gguf: Path, items: Sequence[Tokenized], settings: ServerSettings, *, served: bool) -> GgufRun:
    """Observe a GGUF file in llama.cpp, prompted by its own chat template; `served`: the file will be published."""
    given = given_answers(items)
    scored = dict(
        zip(given, score(gguf, list(given.values()), threads=settings.threads, top=TOP_CANDIDATES), strict=True)
    )
    found, paths, departs = [], {}, {}
    reaches = ("everywhere", "served") if served else ("everywhere",)
    with serve(gguf, context=settings.context, threads=settings.threads, log=settings.log, own_template=True) as server:
        for item in items:
            conversation, name, answer = item.conversation, item.name, None
            ids = tuple(server.tokenize(item.prompt))
            if conversation.reach in reaches:
                paths[name], answer = llamacpp_trace(server, item.prompt, GREEDY_TOKENS, item.penalty(settings.penalty))
                if served and conversation.penalised:
                    departs = _departs(server, item.prompt, answer, settings.penalty)
            prompt = rendered(server, conversation.messages).removeprefix(settings.bos)
            found.append(Observation(name, prompt, ids, len(ids), scored.get(name), answer))
    return GgufRun(tuple(found), paths, departs)


def _departs(server: LlamaServer, prompt: str, answer: Trace, penalty: Penalty) -> dict[str, int | None]:
    """Return the first step of an answer that another sampler changes, by sampler; None where it changes none.

    A comparison of answers alone, as with Ollama, sees the penalty only where it changes one by more than a near tie.
    """
    others = {"without a penalty": None, f"over {OLLAMA_WINDOW} tokens": replace(penalty, window=OLLAMA_WINDOW)}
    found: dict[str, int | None] = {}
    for name, other in others.items():
        _, changed = llamacpp_trace(server, prompt, GREEDY_TOKENS, other)
        steps = tuple(replace(step, top=()) for step in changed.steps)  # as Ollama returns them
        found[name] = departure(answer, replace(changed, steps=steps), SAME_FILE.margin)
    return found
