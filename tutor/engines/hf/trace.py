"""Scores and greedy traces of a model in transformers, in the common form of engines/trace.py.

In: a loaded engine (engine.py), ids of prompts and answers. Out: `Score` and `Trace` of engines/trace.py.
Does not compare two engines.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tutor.engines.hf.engine import TransformersEngine
from tutor.engines.trace import EOS_TEXT, TOP_CANDIDATES, Score, Step, Trace, candidates, group_characters

Row = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and answer ids."""


@torch.no_grad()
def scores(engine: TransformersEngine, rows: Sequence[Row]) -> list[Score]:
    """Return the log-probability (nats, in fp32) of each answer id, and the most probable ids at its position."""
    found = []
    for prompt, answer in rows:
        logprobs = _logprobs(engine, prompt, answer)[:-1]
        chosen = logprobs.gather(1, torch.tensor(answer, device=logprobs.device)[:, None])[:, 0].tolist()
        values, ids = logprobs.topk(TOP_CANDIDATES)
        positions = zip(ids.tolist(), values.tolist(), strict=True)
        found.append(Score(tuple(chosen), tuple(tuple(zip(*position, strict=True)) for position in positions)))
    return found


@torch.no_grad()
def trace_along(engine: TransformersEngine, prompt: Sequence[int], path: Sequence[int]) -> Trace:
    """Return the greedy trace along another engine's ids, without a repetition penalty.

    It ends with the first own token that differs.

    One forward pass instead of one per token gives the same tokens: each depends only on the ids before it.
    """
    logprobs = _logprobs(engine, prompt, path)[:-1]
    own = logprobs.argmax(-1).tolist()
    agreed = next((position for position, (a, b) in enumerate(zip(own, path, strict=True)) if a != b), None)
    if agreed is None:
        return _trace(engine, prompt, path, logprobs)
    return _trace(engine, prompt, own[: agreed + 1], logprobs, cut=True)


def _logprobs(engine: TransformersEngine, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities over the vocabulary, at every position of the answer and after its end."""
    ids = torch.tensor([[*prompt, *answer]], device=engine.model.device)
    logits = engine.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _trace(
    engine: TransformersEngine,
    prompt: Sequence[int],
    ids: Sequence[int],
    logprobs: torch.Tensor,
    *,
    cut: bool = False,
) -> Trace:
    """Return the trace of greedy ids; `cut`: the trace ends before the answer does."""
    decoder = _Decoder(engine, prompt[-1])
    steps, before = [], ""
    for position, token in enumerate(ids):
        values, best = logprobs[position].topk(TOP_CANDIDATES)
        pairs = zip(map(decoder.decode, best.tolist()), values.tolist(), strict=True)
        text = decoder.decode(*ids[: position + 1])
        if text.endswith("\ufffd"):  # a blank before an unfinished character waits for it, as in llama-server
            text = before
        steps.append(Step(text[len(before) :], float(logprobs[position, token]), candidates(pairs)))
        before = text
    if ids[-1] == engine.end_id:
        return Trace((*group_characters(steps[:-1]), replace(steps[-1], text=EOS_TEXT)), "eos", len(prompt))
    return Trace(tuple(group_characters(steps)), None if cut else "length", len(prompt))


class _Decoder:
    """Decodes ids after a token of the prompt: some tokenizers drop the space of a first token."""

    def __init__(self, engine: TransformersEngine, anchor: int) -> None:
        self._tokenizer = engine.tokenizer
        self._anchor = anchor
        self._skipped = len(self._decode([anchor]))

    def decode(self, *ids: int) -> str:
        return self._decode([self._anchor, *ids])[self._skipped :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
