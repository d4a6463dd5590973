"""Greedy traces of a model in Ollama, with the log-probabilities that its API returns.

In: a server, a model's name, a conversation, its prompt format. Out: a `Trace`. Compares nothing.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from tutor.engines.ollama.answers import ChatEvent, CompletionEvent, Event, TokenLogprob
from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import FINISHES, sent_messages
from tutor.engines.trace import EOS_TEXT, TOP_CANDIDATES, Step, Trace, candidates
from tutor.errors import ServiceError
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import TUTOR


def trace(
    server: Ollama,
    model: str,
    messages: Sequence[Message],
    tokens: int,
    prompt: PromptFormat = TUTOR,
    *,
    served_penalty: bool = False,
) -> Trace:
    """The greedy answer without stop texts. Raises ServiceError when the server fails.

    It is without a repetition penalty, or with `served_penalty` as the model's parameters set it: Ollama then returns
    probabilities from before the penalty, so that the steps have no candidates.

    Ollama sends no token of the tags of a thought in a chat. In a format with thoughts the answer is therefore that to
    the prompt which the server renders for this chat, sent as it is.
    """
    options: dict[str, Any] = {"num_predict": tokens, "temperature": 0.0, "top_p": 1.0, "seed": 1, "stop": []}
    options |= {} if served_penalty else {"repeat_penalty": 1.0}
    body: dict[str, Any] = {"model": model, "stream": True, "truncate": False, "options": options}
    body |= {"logprobs": True, "top_logprobs": TOP_CANDIDATES}
    found = _answered(server, body, messages, prompt)
    return replace(found, steps=tuple(replace(step, top=()) for step in found.steps)) if served_penalty else found


def _answered(server: Ollama, body: dict[str, Any], messages: Sequence[Message], prompt: PromptFormat) -> Trace:
    if not prompt.tags[0]:
        return _trace(server.chat({**body, "messages": [dict(message) for message in messages]}))
    text = server.rendered(str(body["model"]), sent_messages(messages, prompt), prompt.think)
    if text is None:
        raise ServiceError("this Ollama does not return its prompts, without which thoughts cannot be compared")
    return _trace(server.complete({**body, "prompt": text, "raw": True}))


def _trace(events: Generator[ChatEvent, None, None] | Generator[CompletionEvent, None, None]) -> Trace:
    steps: list[Step] = []
    end = None
    with contextlib.closing(events):
        for event in events:
            end = event if event.done else end
            if text := _text(event):
                steps.append(_step(text, event.logprobs or ()))
    finish = FINISHES.get(end.done_reason) if end else None
    if end is None or finish is None:
        raise ServiceError("Ollama: the answer ended without its last event", "ask again")
    if finish == "eos":  # the request has no stop texts
        steps.append(Step(EOS_TEXT, None))
    return Trace(tuple(steps), finish, end.prompt_eval_count)


def _text(event: Event) -> str:
    return event.message.content if isinstance(event, ChatEvent) else getattr(event, "response", "")


def _step(text: str, logprobs: Sequence[TokenLogprob]) -> Step:
    """A piece of an answer. For a character of several tokens Ollama returns the last token's probability only."""
    if len(logprobs) != 1 or logprobs[0].token != text:
        return Step(text, None, tokens=max(len(logprobs), 1))
    top = candidates((entry.token, entry.logprob) for entry in logprobs[0].top_logprobs or ())
    return Step(text, logprobs[0].logprob, top)
