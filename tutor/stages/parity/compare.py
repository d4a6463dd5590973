"""Two engines held against each other, conversation by conversation; pure.

In: what each of them made of the same conversations. Out: a check for each thing compared, in the order in which a
fault would show: prompts, their tokens, log-probabilities, greedy answers, their ends. Decides no tolerance.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutor.engines.trace import END, Step, Trace, divergence

if TYPE_CHECKING:
    from tutor.engines.trace import Score


@dataclass(frozen=True)
class Seen:
    """What one engine made of one conversation; None is what it does not say, or was not asked."""

    name: str
    prompt: str | None = None  # as it renders the messages, without BOS
    ids: tuple[int, ...] | None = None  # of the contract's prompt, BOS among them
    tokens: int | None = None  # how many ids; where it tells no ids, as it counted
    scored: "Score | None" = None  # of the given answer, EOS last
    trace: Trace | None = None


@dataclass(frozen=True)
class Tolerance:
    """How far two neighbours may be apart, in nats a token; None: not judged."""

    kl: float  # mean, over the most probable tokens
    mean: float | None  # |difference| of log-probabilities
    worst: float | None  # the same, of one token
    lead: float | None  # of a best token over the second, up to which the other engine may prefer that one


@dataclass(frozen=True)
class Check:
    """One thing compared over all conversations."""

    name: str
    ok: bool
    figures: dict[str, float]
    what: str = ""  # where it is not: the first place, and both sides


CHECKS = ("prompt", "tokens", "log-probabilities", "greedy answer", "end")


def compare(ours: Sequence[Seen], theirs: Sequence[Seen], tolerance: Tolerance) -> list[Check]:
    """The checks of two engines, in their order; what neither was asked is in none of the figures."""
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.name == b.name for a, b in pairs), "the same conversations"
    return [
        _prompts(pairs),
        _tokens(pairs),
        _logprobs(pairs, tolerance),
        _greedy(pairs, tolerance.lead),
        _ends(pairs, tolerance.lead),
    ]


Pair = tuple[Seen, Seen]


def _prompts(pairs: Sequence[Pair]) -> Check:
    shown = [(a.name, a.prompt, b.prompt) for a, b in pairs if a.prompt is not None and b.prompt is not None]
    return _equal("prompt", [(name, a, b, _text_difference) for name, a, b in shown])


def _tokens(pairs: Sequence[Pair]) -> Check:
    """Ids where both tell them, else how many."""
    told: list[tuple[str, object, object, Callable[..., str]]] = []
    for a, b in pairs:
        if a.ids is not None and b.ids is not None:
            told.append((a.name, a.ids, b.ids, _id_difference))
        elif a.tokens is not None and b.tokens is not None:
            told.append((a.name, a.tokens, b.tokens, lambda x, y: f"{x} tokens and {y}"))
    return _equal("tokens", told)


def _equal(name: str, told: Sequence[tuple[str, object, object, Callable[..., str]]]) -> Check:
    wrong = [(where, shown(a, b)) for where, a, b, shown in told if a != b]
    figures = {"equal": float(len(told) - len(wrong)), "of": float(len(told))}
    return Check(name, not wrong, figures, f"«{wrong[0][0]}»: {wrong[0][1]}" if wrong else "")


def _text_difference(a: str, b: str) -> str:
    at = next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(at - 20, 0)
    return f"{a[start : at + 40]!r} and {b[start : at + 40]!r}"


def _id_difference(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    if a == b[1:]:
        return f"the second has {b[0]} more in front (a BOS?)"
    if b == a[1:]:
        return f"the second lacks the {a[0]} in front (a BOS?)"
    at = next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"from token {at + 1} on {list(a[at : at + 4])} and {list(b[at : at + 4])}"


@dataclass(frozen=True)
class Place:
    """One token that both engines gave a probability, after the same text."""

    where: str
    ours: float
    theirs: float
    kl: float | None


def _places(pairs: Sequence[Pair]) -> Iterator[Place]:
    for a, b in pairs:
        if a.scored and b.scored and len(a.scored.top) == len(b.scored.top):  # else they read other tokens
            rows = zip(a.scored.logprobs, b.scored.logprobs, a.scored.top, b.scored.top, strict=True)
            for number, (ours, theirs, top, other) in enumerate(rows, 1):
                where = f"«{a.name}», token {number} of the given answer"
                yield Place(where, ours, theirs, divergence(dict(top), dict(other)))
        if a.trace and b.trace:
            for number, (x, y) in enumerate(zip(a.trace.steps, b.trace.steps, strict=False), 1):
                if x.logprob is not None and y.logprob is not None and x.tokens == y.tokens == 1 and x.text == y.text:
                    kl = divergence(dict(x.top), dict(y.top)) if x.top and y.top else None
                    yield Place(f"«{a.name}», step {number} ({x.text!r})", x.logprob, y.logprob, kl)
                if x.text != y.text:
                    break


def _logprobs(pairs: Sequence[Pair], tolerance: Tolerance) -> Check:
    places = list(_places(pairs))
    if not places:
        return Check("log-probabilities", ok=True, figures={"tokens": 0.0})
    kls = [place.kl for place in places if place.kl is not None]
    worst = max(places, key=lambda place: abs(place.ours - place.theirs))
    figures = {
        "tokens": float(len(places)),
        "change": math.fsum(place.theirs - place.ours for place in places) / len(places),
        "mean": math.fsum(abs(place.ours - place.theirs) for place in places) / len(places),
        "worst": abs(worst.ours - worst.theirs),
        "kl": math.fsum(kls) / len(kls) if kls else 0.0,
    }
    limits = {"kl": tolerance.kl, "mean": tolerance.mean, "worst": tolerance.worst}
    # A figure that is no number is below no limit.
    over = [name for name, limit in limits.items() if limit is not None and not figures[name] <= limit]
    what = ", ".join(f"{WORDS[name]} {figures[name]:.3g} instead of at most {limits[name]:.3g}" for name in over)
    what += f"; the worst at {worst.where}: {worst.ours:.2f} and {worst.theirs:.2f}" if over else ""
    return Check("log-probabilities", not over, {name: round(value, 6) for name, value in figures.items()}, what)


WORDS = {"kl": "KL", "mean": "mean difference", "worst": "worst difference"}


def _parting(a: Trace, b: Trace) -> tuple[int, Step | None, Step | None]:
    """How many steps agree, and the first one on each side that does not; None where a side has no more to say."""
    agreed = next(
        (place for place, (x, y) in enumerate(zip(a.steps, b.steps, strict=False)) if x.text != y.text),
        min(len(a.steps), len(b.steps)),
    )
    x, y = (side.steps[agreed] if agreed < len(side.steps) else None for side in (a, b))
    return agreed, x, y


def _greedy(pairs: Sequence[Pair], lead: float | None) -> Check:
    agreed = whole = same = 0
    wrong = []
    traced = [(a.name, a.trace, b.trace) for a, b in pairs if a.trace and b.trace]
    for name, a, b in traced:
        steps, x, y = _parting(a, b)
        agreed += steps
        whole += max(len(a.steps), steps + (x is not None))
        same += x is None and y is None
        if x is not None and y is not None and END not in (x.text, y.text) and not _is_tie(x, y, lead):
            by = "" if x.lead is None else f", preferred by {x.lead:.2f}"
            wrong.append(f"«{name}»: after {steps} equal steps {x.text!r}{by}, and {y.text!r}")
    figures = {"agreed": float(agreed), "steps": float(whole), "equal": float(same), "of": float(len(traced))}
    return Check("greedy answer", not wrong, figures, wrong[0] if wrong else "")


def _is_tie(x: Step, y: Step, lead: float | None) -> bool:
    """Whether a difference as small as is tolerated could have turned the order of the best two."""
    known = [step.lead for step in (x, y) if step.lead is not None]
    return lead is None or any(value <= lead for value in known)


def _ends(pairs: Sequence[Pair], lead: float | None) -> Check:
    """Whether both end or both go on: behind a given answer, and where a greedy one ends for one of them."""
    asked = 0
    wrong = []
    for a, b in pairs:
        if a.scored and b.scored:
            asked += 1
            x, y = (_last(side.scored) for side in (a, b) if side.scored)
            if x[0] != y[0] and lead is not None and min(x[1], y[1]) > lead:
                wrong.append(f"«{a.name}», behind the given answer: {_ending(x[0])} and {_ending(y[0])}")
        if a.trace and b.trace:
            asked += 1
            steps, s, t = _parting(a.trace, b.trace)
            at_end = (s is not None and s.text == END) != (t is not None and t.text == END)
            if at_end and not (s and t and _is_tie(s, t, lead)) and lead is not None:
                ended = [_ending(bool(step and step.text == END)) for step in (s, t)]
                wrong.append(f"«{a.name}», after {steps} equal steps: {ended[0]} and {ended[1]}")
    figures = {"equal": float(asked - len(wrong)), "of": float(asked)}
    return Check("end", not wrong, figures, wrong[0] if wrong else "")


def _last(score: "Score") -> tuple[bool, float]:
    """Whether EOS is the best at a given answer's end, and by how much the best one leads."""
    (_, first), (_, second) = score.top[-1][:2]
    return score.logprobs[-1] >= first, first - second


def _ending(ends: bool) -> str:  # noqa: FBT001
    return "one ends" if ends else "one goes on"
