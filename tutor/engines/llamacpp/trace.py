"""What a running llama-server makes of a conversation: how its file's own template renders it, its answer by steps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutor.engines.llamacpp.server import FINISHES, LlamaServer
from tutor.engines.trace import END, TOP, Step, Trace, candidates, grouped
from tutor.errors import ServiceError
from tutor.prompt import Message


def rendered(server: LlamaServer, messages: Sequence[Message]) -> str:
    """The prompt that the file's own chat template makes, without BOS; of a server that kept it (`own_template`)."""
    return str(server.post("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"])


def trace(server: LlamaServer, prompt: str, tokens: int) -> Trace:
    """The greedy answer to a prompt. Raises ServiceError when the server fails.

    Without a repetition penalty and without stop texts, for which the server would hold back the beginning of one.
    """
    request = {
        "prompt": prompt,
        "stream": False,
        "n_predict": tokens,
        "n_probs": TOP,
        "samplers": ["temperature"],
        "temperature": 0.0,
        "seed": 1,
        "cache_prompt": False,
    }
    answer = server.post("/completion", request)
    try:
        finish = FINISHES[answer["stop_type"]]
        found = [_step(item) for item in answer.get("completion_probabilities", ())]
        ended = [replace(found.pop(), text=END)] if finish == "stop" else []
        return Trace((*grouped(found), *ended), finish, int(answer["tokens_evaluated"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"llama-server answers in another form: {error!r}", "make llamacpp") from error


def _step(item: Mapping[str, Any]) -> Step:
    top = candidates((entry["token"], float(entry["logprob"])) for entry in item["top_logprobs"])
    return Step(str(item["token"]), float(item["logprob"]), top)
