"""Scores and greedy answers token by token, in one form for all engines.

In: the tokens, log-probabilities and candidates that an engine returns. Out: steps of complete characters, which can be
compared as text, because Ollama returns no ids. Sets no tolerance.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tutor.engines.protocol import Finish

TOP_CANDIDATES = 20
"""Number of candidates per position; the maximum that Ollama returns."""
EOS_TEXT = ""
"""Text of the step for EOS; no other step is empty."""
BROKEN = "\ufffd"
"""Character in place of bytes that are no character."""
MIN_REST = 1e-4
"""Lower bound of the probability mass outside the top candidates; less is rounding."""
MAX_EXPONENT = 700.0
"""Upper bound of a natural logarithm whose exponential is a float."""
Key = TypeVar("Key")
Candidates = tuple[tuple[str, float], ...]
"""Texts and their natural-log probabilities, best first; of equal texts (parts of characters) the best one."""


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one given answer under a model, token by token (natural logarithms)."""

    logprobs: tuple[float, ...]  # of the answer's ids
    top: tuple[tuple[tuple[int, float], ...], ...]  # at each position, the most probable ids, best first
    kl: tuple[float, ...] = ()  # at each position, KL(reference || model) over the full vocabulary, in nats
    same: tuple[bool, ...] = ()  # at each position, whether the reference has the same most probable id


@dataclass(frozen=True)
class Penalty:
    """A repetition penalty: the logit of every token in the window is divided by it, or multiplied where negative."""

    factor: float
    window: int  # number of last tokens, of prompt and answer


@dataclass(frozen=True)
class Step:
    """One token of an answer, or several that only together are complete characters."""

    text: str
    logprob: float | None  # natural log, before a repetition penalty; None when the engine does not return it
    top: Candidates = ()  # those that the engine chose its first token from, behind the penalty; empty: not known
    tokens: int = 1

    @property
    def margin(self) -> float | None:
        """Log-probability of the best candidate minus that of the second one, in nats; None when unknown."""
        return self.top[0][1] - self.top[1][1] if len(self.top) > 1 else None

    def distance(self, other: "Step") -> float | None:
        """Log-probability of the best candidate minus that of another step's text, in nats; None when unknown."""
        text = other.text if other.tokens == 1 else ""  # its first token is a part of a character
        found = dict(self.top).get(text)
        return None if found is None else self.top[0][1] - found


@dataclass(frozen=True)
class Trace:
    """A greedy answer by steps."""

    steps: tuple[Step, ...]
    finish: Finish | None  # None: the trace ends before the answer
    prompt_tokens: int

    @property
    def text(self) -> str:
        """The text of the answer."""
        return "".join(step.text for step in self.steps)


def candidates(pairs: Iterable[tuple[str, float]]) -> Candidates:
    """The candidates of a position. Of those that decode to no complete character only the best one is kept.

    Their sum would hide that the best of them and a character are nearly equal.
    """
    found: dict[str, float] = {}
    for decoded, logprob in pairs:
        text = decoded.replace(BROKEN, "")
        found[text] = max(logprob, found.get(text, logprob))
    return tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def group_characters(tokens: Iterable[Step]) -> Iterator[Step]:
    """Group steps of one token each, in which a part of a character has an empty text, into complete characters.

    An incomplete character at the end is dropped.
    """
    held: list[Step] = []
    for token in tokens:
        held.append(token)
        if token.text:
            yield token if len(held) == 1 else _joined(held)
            held = []


def _joined(held: Sequence[Step]) -> Step:
    logprobs = [step.logprob for step in held if step.logprob is not None]
    total = math.fsum(logprobs) if len(logprobs) == len(held) else None
    return Step("".join(step.text for step in held), total, tokens=sum(step.tokens for step in held))


def aligned(ours: Trace, theirs: Trace) -> tuple[Trace, Trace]:
    """Join steps until both traces have equal texts beside bytes that are no character (U+FFFD).

    Engines hold such bytes back for different numbers of tokens, and Ollama leaves some out. Where a whole trace ends
    within a step of the other, both end before that step.
    """
    sides = (list(ours.steps), list(theirs.steps))
    place = 0
    while place < min(map(len, sides)):
        texts = [steps[place].text for steps in sides]
        bare = [text.replace(BROKEN, "") for text in texts]
        short = bare.index(min(bare, key=len))
        apart = texts[0] != texts[1] and EOS_TEXT not in texts and bare != texts
        if apart and bare[0] == bare[1] != "":
            for steps in sides:
                steps[place] = replace(steps[place], text=bare[0], logprob=None, top=())
            place += 1
        elif not apart or not bare[1 - short].startswith(bare[short]):
            place += 1
        elif place + 1 < len(sides[short]) and sides[short][place + 1].text != EOS_TEXT:
            pair = sides[short][place : place + 2]  # its first candidates stay: a near tie with one is still seen
            sides[short][place : place + 2] = [replace(_joined(pair), top=pair[0].top)]
        elif (ours, theirs)[short].finish == "length":
            for steps in sides:
                del steps[place:]
        else:
            place += 1
    return replace(ours, steps=tuple(sides[0])), replace(theirs, steps=tuple(sides[1]))


def divergence(reference: Mapping[Key, float], other: Mapping[Key, float]) -> float:
    """KL(reference || other) in nats over the reference's candidates, with all other tokens as one.

    A candidate that `other` lacks gets the log-probability of the last candidate in `other`: the result is a lower
    estimate. NaN where a value is not finite, or no logarithm of a number.
    """
    if not all(math.isfinite(value) and value < MAX_EXPONENT for side in (reference, other) for value in side.values()):
        return math.nan
    last = min(other.values())
    pairs = [(logprob, other.get(key, last)) for key, logprob in reference.items()]
    rests = [max(1.0 - math.fsum(math.exp(pair[side]) for pair in pairs), MIN_REST) for side in (0, 1)]
    parts = [math.exp(ours) * (ours - theirs) for ours, theirs in pairs]
    return max(0.0, math.fsum([*parts, rests[0] * math.log(rests[0] / rests[1])]))
