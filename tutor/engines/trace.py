"""What an engine did, token by token, in a form that any other engine's can be held against.

In: what each engine says in its own way of the tokens that it generated. Out: steps of whole characters, comparable
as text: Ollama names no ids. Judges nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tutor.engines.protocol import Finish

TOP = 20
"""How many candidates are looked at in every place: the most that Ollama tells."""
END = ""
"""The text of the step that ends an answer, EOS; no other step is empty."""

REST = 1e-4
"""The least that all other tokens together are taken to have: smaller differences are rounding of the ones named."""
Key = TypeVar("Key")

Candidates = tuple[tuple[str, float], ...]
"""Texts and their natural-log probabilities, best first; equal texts (parts of characters) are one."""


@dataclass(frozen=True)
class Score:
    """What a model makes of one given answer, token by token, in natural logarithms."""

    logprobs: tuple[float, ...]  # of the answer's ids
    top: tuple[tuple[tuple[int, float], ...], ...]  # at each place, the most probable ids, best first
    kl: tuple[float, ...] = ()  # at each place KL(reference || model) over the whole vocabulary, in nats
    same: tuple[bool, ...] = ()  # at each place, whether the reference prefers the same id


@dataclass(frozen=True)
class Step:
    """What was added to an answer at once: one token, or several that only together are whole characters."""

    text: str
    logprob: float | None  # natural log; None where the engine does not say
    top: Candidates = ()  # of a single token
    tokens: int = 1

    @property
    def lead(self) -> float | None:
        """By how much, in nats, the best candidate is ahead of the second one; None where that is not known."""
        return self.top[0][1] - self.top[1][1] if len(self.top) > 1 else None


@dataclass(frozen=True)
class Trace:
    """A greedy answer."""

    steps: tuple[Step, ...]
    finish: Finish | None  # None: not followed to its end
    prompt_tokens: int

    @property
    def text(self) -> str:
        """The answer as it came."""
        return "".join(step.text for step in self.steps)


def candidates(pairs: Iterable[tuple[str, float]]) -> Candidates:
    """The candidates of a place; what decodes to no whole character counts as one, whatever its bytes are."""
    found: dict[str, float] = {}
    for decoded, logprob in pairs:
        text = decoded.replace("\ufffd", "")
        found[text] = _added(found[text], logprob) if text in found else logprob
    return tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _added(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def grouped(tokens: Iterable[Step]) -> Iterator[Step]:
    """Steps of whole characters from steps of one token each, in which a part of a character has an empty text.

    What is left at the end is no whole character, and is dropped.
    """
    held: list[Step] = []
    for token in tokens:
        held.append(token)
        if token.text:
            yield token if len(held) == 1 else _joined(held)
            held = []


def _joined(held: list[Step]) -> Step:
    logprobs = [step.logprob for step in held if step.logprob is not None]
    whole = math.fsum(logprobs) if len(logprobs) == len(held) else None
    return Step("".join(step.text for step in held), whole, tokens=len(held))


def divergence(reference: Mapping[Key, float], other: Mapping[Key, float]) -> float:
    """KL(reference || other) in nats over the reference's candidates, all the rest taken as one.

    A candidate that the other does not name is taken as its last one, so that the result is rather too small.
    """
    last = min(other.values())
    pairs = [(logprob, other.get(key, last)) for key, logprob in reference.items()]
    rests = [max(1.0 - math.fsum(math.exp(pair[side]) for pair in pairs), REST) for side in (0, 1)]
    parts = [math.exp(ours) * (ours - theirs) for ours, theirs in pairs]
    return max(0.0, math.fsum([*parts, rests[0] * math.log(rests[0] / rests[1])]))
