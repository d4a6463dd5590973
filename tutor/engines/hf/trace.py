"""What a model in transformers makes of ids: scores with candidates, greedy steps, and whether it follows a path.

In: a loaded engine (hf.py), ids of prompts and answers. Out: the same scores and traces as llama.cpp's.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tutor.engines.hf.engine import TransformersEngine
from tutor.engines.trace import END, TOP, Score, Step, Trace, candidates, grouped

Row = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and answer ids."""


@torch.no_grad()
def scores(engine: TransformersEngine, rows: Sequence[Row]) -> list[Score]:
    """Log-probabilities (nats, in fp32) of each row's answer ids, and the TOP most probable ids at each place."""
    found = []
    for prompt, answer in rows:
        logprobs = _logprobs(engine, prompt, answer)[:-1]
        chosen = logprobs.gather(1, torch.tensor(answer, device=logprobs.device)[:, None])[:, 0].tolist()
        values, ids = logprobs.topk(TOP)
        places = zip(ids.tolist(), values.tolist(), strict=True)
        found.append(Score(tuple(chosen), tuple(tuple(zip(*place, strict=True)) for place in places)))
    return found


@torch.no_grad()
def trace(engine: TransformersEngine, prompt: Sequence[int], tokens: int) -> tuple[list[int], Trace]:
    """The greedy answer to a prompt, without a repetition penalty: its ids (EOS among them) and its steps."""
    ids: list[int] = []
    given, cache, found = list(prompt), None, []
    while len(ids) < tokens and (not ids or ids[-1] != engine.tokenizer.eos_token_id):
        out = engine.model(
            input_ids=torch.tensor([given], device=engine.model.device), past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        found.append(torch.log_softmax(out.logits[0, -1].float(), dim=-1))
        given = [int(found[-1].argmax())]
        ids += given
    return ids, _trace(engine, prompt, ids, torch.stack(found))


@torch.no_grad()
def followed(engine: TransformersEngine, prompt: Sequence[int], path: Sequence[int]) -> Trace:
    """The greedy answer as far as it follows another one's ids: with its own first step elsewhere, it is left there.

    One pass instead of one a token, with the same result: what comes next depends on nothing but what stands before.
    """
    logprobs = _logprobs(engine, prompt, path)[:-1]
    own = logprobs.argmax(-1).tolist()
    agreed = next((place for place, (a, b) in enumerate(zip(own, path, strict=True)) if a != b), None)
    if agreed is None:
        return _trace(engine, prompt, path, logprobs)
    return _trace(engine, prompt, own[: agreed + 1], logprobs, left=True)


def _logprobs(engine: TransformersEngine, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Over the vocabulary, at every place of the answer and behind it."""
    ids = torch.tensor([[*prompt, *answer]], device=engine.model.device)
    logits = engine.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _trace(
    engine: TransformersEngine,
    prompt: Sequence[int],
    ids: Sequence[int],
    logprobs: torch.Tensor,
    *,
    left: bool = False,
) -> Trace:
    """The trace of ids that were each the best at their place; `left`: it is not known how it would go on."""
    decoder = _Decoder(engine, prompt[-1])
    steps, whole = [], ""
    for place, token in enumerate(ids):
        values, best = logprobs[place].topk(TOP)
        pairs = zip(map(decoder.alone, best.tolist()), values.tolist(), strict=True)
        text = decoder.text(ids[: place + 1])
        steps.append(Step(text[len(whole) :], float(logprobs[place, token]), candidates(pairs)))
        whole = text
    if ids[-1] == engine.tokenizer.eos_token_id:
        return Trace((*grouped(steps[:-1]), replace(steps[-1], text=END)), "stop", len(prompt))
    return Trace(tuple(grouped(steps)), None if left else "length", len(prompt))


class _Decoder:
    """Ids as text behind a token of the prompt: some decoders drop the blank of a first one."""

    def __init__(self, engine: TransformersEngine, anchor: int) -> None:
        self._tokenizer = engine.tokenizer
        self._anchor = anchor
        self._skipped = len(self._decode([anchor]))

    def text(self, ids: Sequence[int]) -> str:
        """As far as whole characters go."""
        return self.alone(*ids).rstrip("\ufffd")

    def alone(self, *ids: int) -> str:
        return self._decode([self._anchor, *ids])[self._skipped :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
