"""Scores and greedy traces of a model in transformers, in the common form of engines/trace.py.

In: a model that returns logits, ids of prompts and answers. Out: `Score` and `Trace` of engines/trace.py.
Does not load a model, and does not compare two engines.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tutor.engines.trace import EOS_TEXT, TOP_CANDIDATES, Penalty, Score, Step, Trace, candidates, group_characters
from tutor.prompt.format import PromptFormat

Row = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and answer ids."""


class Reader(Protocol):
    """A model, loaded or read layer by layer, with its tokenizer."""

    tokenizer: Any
    prompt: PromptFormat
    end_id: int | None

    def logits(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        """Yield for each row the logits in fp32 that each of its answer's ids was chosen from, one line an id."""
        ...


@dataclass(frozen=True)
class Followed:
    """Another engine's greedy answer, which a model follows."""

    prompt: Sequence[int]
    path: Sequence[int]
    penalty: Penalty | None = None


@torch.no_grad()
def observe(reader: Reader, given: Sequence[Row], followed: Sequence[Followed]) -> tuple[list[Score], list[Trace]]:
    """Return the scores of given answers, and the greedy traces along other engines' answers; the model is read once.

    A trace ends with the first own token that differs. One forward pass instead of one per token gives the same tokens:
    each depends only on the ids before it.
    """
    logits = reader.logits([*given, *((item.prompt, item.path) for item in followed)])
    scores = [_score(next(logits), answer) for _, answer in given]
    return scores, [_trace_along(reader, item, next(logits)) for item in followed]


def _score(logits: torch.Tensor, answer: Sequence[int]) -> Score:
    """Return the log-probability (nats) of each answer id, and the most probable ids at its position."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(answer, device=logprobs.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(TOP_CANDIDATES)
    positions = zip(ids.tolist(), values.tolist(), strict=True)
    return Score(tuple(chosen), tuple(tuple(zip(*position, strict=True)) for position in positions))


def _trace_along(reader: Reader, item: Followed, logits: torch.Tensor) -> Trace:
    chosen_from = _penalised(logits, item) if item.penalty else logits
    own = chosen_from.argmax(-1).tolist()
    agreed = next((place for place, (a, b) in enumerate(zip(own, item.path, strict=True)) if a != b), None)
    ids = item.path if agreed is None else own[: agreed + 1]
    values, best = torch.log_softmax(chosen_from[: len(ids)], dim=-1).topk(TOP_CANDIDATES)
    chosen = torch.log_softmax(logits[: len(ids)], dim=-1).gather(1, torch.tensor(ids, device=logits.device)[:, None])
    places = zip(chosen[:, 0].tolist(), best.tolist(), values.tolist(), strict=True)
    return _trace(reader, item.prompt, ids, places, cut=agreed is not None)


def _penalised(logits: torch.Tensor, item: Followed) -> torch.Tensor:
    """Return the logits behind the penalty, of the same class that transformers' generate() uses."""
    assert item.penalty is not None
    penalise, ids = RepetitionPenaltyLogitsProcessor(item.penalty.factor), [*item.prompt, *item.path]
    lines = []
    for place, line in enumerate(torch.split(logits, 1)):
        seen = ids[: len(item.prompt) + place][-item.penalty.window :]
        lines.append(penalise(torch.tensor([seen], device=logits.device), line))
    return torch.cat(lines)


def _trace(
    reader: Reader,
    prompt: Sequence[int],
    ids: Sequence[int],
    places: Iterable[tuple[float, Sequence[int], Sequence[float]]],
    *,
    cut: bool,
) -> Trace:
    """Return the trace of greedy ids; `places`: of each its log-probability, and the candidates with theirs.

    `cut`: the trace ends before the answer does.
    """
    decoder = _Decoder(reader, prompt[-1])
    steps, before = [], ""
    for position, (logprob, best, values) in enumerate(places):
        pairs = zip(map(decoder.decode, best), values, strict=True)
        text = decoder.decode(*ids[: position + 1])
        if text.endswith("\ufffd"):  # a blank before an unfinished character waits for it, as in llama-server
            text = before
        steps.append(Step(text[len(before) :], logprob, candidates(pairs)))
        before = text
    if ids[-1] == reader.end_id:
        return Trace((*group_characters(steps[:-1]), replace(steps[-1], text=EOS_TEXT)), "eos", len(prompt))
    return Trace(tuple(group_characters(steps)), None if cut else "length", len(prompt))


class _Decoder:
    """Decodes ids after a token of the prompt: some tokenizers drop the space of a first token."""

    def __init__(self, reader: Reader, anchor: int) -> None:
        self._tokenizer = reader.tokenizer
        self._anchor = anchor
        self._skipped = len(self._decode([anchor]))

    def decode(self, *ids: int) -> str:
        return self._decode([self._anchor, *ids])[self._skipped :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
