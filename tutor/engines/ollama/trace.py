"""Greedy traces of a model in Ollama, with the log-probabilities that its API returns.

In: a server, a model's name, a conversation. Out: a `Trace`. Compares nothing.
"""

from collections.abc import Sequence
from typing import Any

from tutor.engines.ollama.answers import TokenLogprob
from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import FINISHES
from tutor.engines.trace import EOS_TEXT, TOP_CANDIDATES, Step, Trace, candidates
from tutor.errors import ServiceError
from tutor.prompt.messages import Message


def trace(server: Ollama, model: str, messages: Sequence[Message], tokens: int) -> Trace:
    """The greedy answer, without repetition penalty and stop texts. Raises ServiceError when the server fails."""
    options = {"num_predict": tokens, "temperature": 0.0, "top_p": 1.0, "repeat_penalty": 1.0, "seed": 1}
    body: dict[str, Any] = {"model": model, "messages": [dict(message) for message in messages], "stream": True}
    body |= {"truncate": False, "options": {**options, "stop": []}, "logprobs": True, "top_logprobs": TOP_CANDIDATES}
    steps: list[Step] = []
    end = None
    for event in server.chat(body):
        end = event if event.done else end
        if event.message.content:
            steps.append(_step(event.message.content, event.logprobs or ()))
    finish = FINISHES.get(end.done_reason) if end else None
    if end is None or finish is None:
        raise ServiceError("Ollama: the answer ended without its last event", "ask again")
    if finish == "stop":
        steps.append(Step(EOS_TEXT, None))
    return Trace(tuple(steps), finish, end.prompt_eval_count)


def _step(text: str, logprobs: Sequence[TokenLogprob]) -> Step:
    """A piece of an answer. For a character of several tokens Ollama returns the last token's probability only."""
    if len(logprobs) != 1 or logprobs[0].token != text:
        return Step(text, None, tokens=max(len(logprobs), 1))
    top = candidates((entry.token, entry.logprob) for entry in logprobs[0].top_logprobs or ())
    return Step(text, logprobs[0].logprob, top)
