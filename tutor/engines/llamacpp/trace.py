"""Prompts and greedy traces of a running llama-server.

In: a server, conversations or prompts. Out: the prompt of the file's own chat template; a `Trace`. Compares nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutor.engines.llamacpp.server import FINISHES, LlamaServer
from tutor.engines.trace import EOS_TEXT, TOP_CANDIDATES, Step, Trace, candidates, group_characters
from tutor.errors import ServiceError
from tutor.prompt.messages import Message


def rendered(server: LlamaServer, messages: Sequence[Message]) -> str:
    """The prompt that the file's own chat template makes, without BOS; needs a server with `own_template`."""
    return str(server.post("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"])


def trace(server: LlamaServer, prompt: str, tokens: int) -> tuple[list[int], Trace]:
    """The greedy answer to a prompt, without repetition penalty: its ids (EOS included) and its trace.

    There are no stop texts: the server would delay text that may be the beginning of one.
    Raises ServiceError when the server fails.
    """
    request = {
        "prompt": prompt,
        "stream": False,
        "n_predict": tokens,
        "n_probs": TOP_CANDIDATES,
        "samplers": ["temperature"],
        "temperature": 0.0,
        "seed": 1,
        "cache_prompt": False,
        "return_tokens": True,
    }
    answer = server.post("/completion", request)
    try:
        finish = FINISHES[answer["stop_type"]]
        found = [_step(item) for item in answer.get("completion_probabilities", ())]
        ended = [replace(found.pop(), text=EOS_TEXT)] if finish == "eos" else []
        ids = [int(id_) for id_ in answer["tokens"]]
        return ids, Trace((*group_characters(found), *ended), finish, int(answer["tokens_evaluated"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"llama-server returned an unknown form: {error!r}", "make llamacpp") from error


def _step(item: Mapping[str, Any]) -> Step:
    top = candidates((entry["token"], float(entry["logprob"])) for entry in item["top_logprobs"])
    return Step(str(item["token"]), float(item["logprob"]), top)
