"""Parity of a model in Ollama with the served GGUF in llama.cpp, over the conversations of the parity stage.

In: reference.json of the parity stage, the prompt format, a server and a model on it. Out: the hand-off to Ollama,
compared. Needs no torch, and runs no engine but Ollama.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import sent_messages
from tutor.engines.ollama.trace import trace
from tutor.errors import ArtifactError
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import TUTOR
from tutor.stages.parity.compare import Comparison, Observation
from tutor.stages.parity.gate import MODEL, SAME_FILE, HandOff, hand_off
from tutor.stages.parity.record import REFERENCE, from_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The parity stage's record of the served file, and the format of its prompts."""

    engine: str  # the quantization of the file
    steps: int  # number of tokens of a greedy answer
    messages: tuple[tuple[Message, ...], ...]
    answered: tuple[bool, ...]  # whether Ollama answers, or only renders the prompt
    penalised: tuple[bool, ...]  # whether the answer is with the repetition penalty that is served
    seen: tuple[Observation, ...]
    prompt: PromptFormat = TUTOR


def read_reference(folder: Path, prompt: PromptFormat = TUTOR) -> Reference:
    """Read the record in the folder of the parity stage. Raises ArtifactError when it is missing or damaged."""
    path = folder / REFERENCE
    try:
        record = json.loads(path.read_text("utf-8"))
        conversations = record["conversations"]
        return Reference(
            engine=record["served"],
            steps=record["steps"],
            messages=tuple(tuple(item["messages"]) for item in conversations),
            answered=tuple(item["reach"] != "nowhere" for item in conversations),
            penalised=tuple(bool(item["penalised"]) for item in conversations),
            seen=tuple(map(from_record, record["engines"][record["served"]])),
            prompt=prompt,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "run: tutor clean parity, and tutor parity") from None


def compare_model(reference: Reference, server: Ollama, model: str, *, same_file: bool = True) -> HandOff:
    """Compare a model in Ollama with the served file in llama.cpp. Raises ServiceError when the server fails.

    Without `same_file` (base and adapter apart, whose numbers differ) only prompts and their tokens are compared.
    """
    ours = [item if same_file else _without_answer(item) for item in reference.seen]
    theirs = list(_observe(reference, server, model, same_file=same_file))
    return hand_off("publish", (reference.engine, "Ollama"), (ours, theirs), SAME_FILE, answers=same_file)


def compare_digest(engine: str, found: str, wanted: str) -> HandOff:
    """Compare the digest of a model with that of the published one. With another digest no answer is compared."""
    what = "" if found == wanted else f"its digest is {found[:12]}, published was {wanted[:12]}"
    return HandOff("publish", engine, "Ollama", (Comparison(MODEL, not what, {}, what),), SAME_FILE)


def _observe(reference: Reference, server: Ollama, model: str, *, same_file: bool) -> Iterator[Observation]:
    warn, form = True, reference.prompt
    asked = zip(reference.messages, reference.answered, reference.penalised, reference.seen, strict=True)
    for messages, answered, penalised, item in asked:
        if not _can_send(messages, form):
            yield Observation(item.name)
            continue
        prompt = server.rendered(model, messages, form.think)
        if prompt is None and warn:
            warn = False
            log.warning("this Ollama does not return its prompts: only their numbers of tokens are compared")
        if not answered:
            yield Observation(item.name, prompt)
            continue
        steps = reference.steps if same_file else 1
        found = trace(server, model, messages, steps, form, served_penalty=penalised)
        yield Observation(item.name, prompt, None, found.prompt_tokens, None, found if same_file else None)
        log.info("compared %r: %d tokens", item.name, found.prompt_tokens)


def _can_send(messages: Sequence[Message], prompt: PromptFormat) -> bool:
    """Whether Ollama gives a conversation to the GGUF's own template as the format does; to TEMPLATE it gives all."""
    try:
        return bool(prompt.go_template or sent_messages(messages, prompt))
    except ValueError:
        return False


def _without_answer(seen: Observation) -> Observation:
    return Observation(seen.name, seen.prompt, seen.ids, seen.tokens)
