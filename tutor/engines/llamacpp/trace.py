"""Prompts and greedy traces of a running llama-server.

In: a server, conversations or prompts. Out: the prompt of the file's own chat template; a `Trace`. Compares nothing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tutor.engines.llamacpp.server import FINISHES, LlamaServer
from tutor.engines.trace import (
    EOS_TEXT,
    TOP_CANDIDATES,
    Candidates,
    Penalty,
    Step,
    Trace,
    candidates,
    group_characters,
)
from tutor.errors import ServiceError
from tutor.prompt.messages import Message

DRAWS = 4
"""Maximum number of tokens that are drawn to see the candidates of one place."""


def rendered(server: LlamaServer, messages: Sequence[Message]) -> str:
    """The prompt that the file's own chat template makes, without BOS; needs a server with `own_template`."""
    return str(server.post("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"])


def trace(server: LlamaServer, prompt: str, tokens: int, penalty: Penalty | None = None) -> tuple[list[int], Trace]:
    """The greedy answer to a prompt: its ids (EOS included) and its trace.

    There are no stop texts: the server would delay text that may be the beginning of one.
    Raises ServiceError when the server fails.
    """
    request = {
        "prompt": prompt,
        "stream": False,
        "n_predict": tokens,
        "n_probs": TOP_CANDIDATES,
        "temperature": 0.0,
        "seed": 1,
        "cache_prompt": False,
        "return_tokens": True,
        **_samplers(penalty, "temperature"),
    }
    answer = server.post("/completion", request)
    try:
        finish = FINISHES[answer["stop_type"]]
        items = answer.get("completion_probabilities", ())
        ids = [int(id_) for id_ in answer["tokens"]]
        places = _places([int(item["id"]) for item in items], ids)
        found = [_step(item, count) for item, count in zip(items, _counts(places), strict=True)]
        if penalty:
            chosen_from = list(_penalised(server, server.tokenize(prompt), ids, penalty))
            tops = [chosen_from[place] if step.top else () for step, place in zip(found, places, strict=True)]
            found = [replace(step, top=top) for step, top in zip(found, tops, strict=True)]
        ended = [replace(found.pop(), text=EOS_TEXT)] if finish == "eos" else []
        return ids, Trace((*group_characters(found), *ended), finish, int(answer["tokens_evaluated"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"llama-server returned an unknown form: {error!r}", "make llamacpp") from error


def _samplers(penalty: Penalty | None, *others: str) -> dict[str, Any]:
    """The fields of a request that name its samplers, so that no default applies."""
    if penalty is None:
        return {"samplers": list(others)}
    return {
        "samplers": ["penalties", *others],
        "repeat_penalty": penalty.factor,
        "repeat_last_n": penalty.window,
    }


def _penalised(
    server: LlamaServer, prompt: Sequence[int], answer: Sequence[int], penalty: Penalty
) -> Iterator[Candidates]:
    """The candidates behind the penalty at each token of an answer.

    With its answers the server returns them before the penalty, or those that temperature 0 leaves: one. So it is asked
    for one token after each, whatever that is. It tells nothing of a token that is a part of a character: then it
    draws again, and where that is in vain the candidates are empty, not known.
    """
    for place in range(len(answer)):
        request = {
            "prompt": [*prompt, *answer[:place]],
            "stream": False,
            "n_predict": 1,
            "n_probs": TOP_CANDIDATES,
            "post_sampling_probs": True,
            "cache_prompt": True,
            **_samplers(penalty),
        }
        drawn = (server.post("/completion", {**request, "seed": seed}) for seed in range(1, DRAWS + 1))
        items = next((found for each in drawn if (found := each.get("completion_probabilities"))), ())
        yield candidates((entry["token"], math.log(entry["prob"])) for item in items for entry in item["top_probs"])


def _places(reported: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return the place in an answer of each token that the server reports; of bytes held back it reports the last."""
    places: list[int] = []
    for id_ in reported:
        places.append(ids.index(id_, places[-1] + 1 if places else 0))
    return places


def _counts(places: Sequence[int]) -> list[int]:
    """Return the number of tokens up to each place, from the place before."""
    return [place - before for before, place in pairwise([-1, *places])]


def _step(item: Mapping[str, Any], tokens: int) -> Step:
    """A step of one token; of several the server tells only the last one's probability."""
    if tokens > 1:
        return Step(str(item["token"]), None, tokens=tokens)
    top = candidates((entry["token"], float(entry["logprob"])) for entry in item["top_logprobs"])
    return Step(str(item["token"]), float(item["logprob"]), top)
