"""What Ollama makes of the parity gate's conversations, against what the stage recorded of the served file.

In: the parity stage's reference.json, a server and a model on it. Out: the hand-over to Ollama. Needs no torch.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.trace import trace
from tutor.errors import ArtifactError
from tutor.prompt import Message
from tutor.stages.parity.compare import Check, Seen
from tutor.stages.parity.gate import PUBLISHED, HandOver, hand_over
from tutor.stages.parity.record import REFERENCE, from_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """What the parity stage recorded of the served file."""

    engine: str  # the file's quantization
    steps: int  # tokens of a greedy answer
    messages: tuple[tuple[Message, ...], ...]
    answered: tuple[bool, ...]  # whether Ollama has to answer, or only to render
    seen: tuple[Seen, ...]


def read_reference(folder: Path) -> Reference:
    """The record in the parity stage's folder. Raises ArtifactError when it is not there or damaged."""
    path = folder / REFERENCE
    try:
        record = json.loads(path.read_text("utf-8"))
        conversations = record["conversations"]
        return Reference(
            engine=record["served"],
            steps=record["steps"],
            messages=tuple(tuple(item["messages"]) for item in conversations),
            answered=tuple(item["reach"] != "nowhere" for item in conversations),
            seen=tuple(map(from_record, record["engines"][record["served"]])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "run: tutor clean parity, and tutor parity") from None


def published(reference: Reference, server: Ollama, model: str, *, same_file: bool = True) -> HandOver:
    """A model in Ollama against the served file in llama.cpp. Raises ServiceError when the server fails.

    Without `same_file` (base and adapter apart, computed otherwise) only prompts and their tokens are compared.
    """
    ours = [item if same_file else _without_answer(item) for item in reference.seen]
    theirs = list(_ask(reference, server, model, same_file=same_file))
    return hand_over("publish", (reference.engine, "Ollama"), (ours, theirs), PUBLISHED)


def identity(engine: str, found: str, wanted: str) -> HandOver:
    """Whether the model under the name is the one that was published, by its digest: another one need not be asked."""
    what = "" if found == wanted else f"its digest is {found[:12]}, published was {wanted[:12]}"
    return HandOver("publish", engine, "Ollama", (Check("model", not what, {}, what),), PUBLISHED)


def _ask(reference: Reference, server: Ollama, model: str, *, same_file: bool) -> Iterator[Seen]:
    told = True
    for messages, answered, item in zip(reference.messages, reference.answered, reference.seen, strict=True):
        prompt = server.rendered(model, messages)
        if prompt is None and told:
            told = False
            log.warning("this Ollama does not show its prompts: they are compared by their number of tokens alone")
        if not answered:
            yield Seen(item.name, prompt)
            continue
        found = trace(server, model, messages, reference.steps if same_file else 1)
        yield Seen(item.name, prompt, None, found.prompt_tokens, None, found if same_file else None)
        log.info("asked %r: %d tokens", item.name, found.prompt_tokens)


def _without_answer(seen: Seen) -> Seen:
    return Seen(seen.name, seen.prompt, seen.ids, seen.tokens)
