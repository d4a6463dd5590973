"""Compare two engines conversation by conversation. Pure.

In: the observations of both engines, for equal conversations. Out: one `Comparison` a subject, from cause to effect:
prompts, their tokens, log-probabilities, greedy answers, their ends. A subject that must be shown and of which nothing
could be compared is a difference. Chooses no tolerance.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tutor.engines.trace import EOS_TEXT, Step, Trace, aligned, divergence

if TYPE_CHECKING:
    from tutor.engines.trace import Score


@dataclass(frozen=True)
class Observation:
    """The results of one engine for one conversation; None where the engine does not report a value, or did not run."""

    name: str
    prompt: str | None = None  # the rendered messages, without BOS
    ids: tuple[int, ...] | None = None  # of the prompt contract's prompt, BOS included
    tokens: int | None = None  # number of ids; the engine's own count where it reports no ids
    scored: "Score | None" = None  # of the given answer, EOS last
    trace: Trace | None = None


@dataclass(frozen=True)
class Tolerance:
    """Maximum differences between two neighbours, in nats a token; None: unlimited."""

    kl: float  # mean, over the most probable tokens
    mean: float | None  # mean of |difference| of log-probabilities
    worst: float | None  # largest |difference| of one token's log-probabilities
    margin: float | None  # margin of the best token over the second, up to which the order may change


@dataclass(frozen=True)
class Comparison:
    """One subject, compared over all conversations."""

    name: str
    ok: bool
    figures: dict[str, float]
    what: str = ""  # the first difference, with both sides

    @property
    def compared(self) -> bool:
        """Whether there was a value that both engines have."""
        return self.figures.get("of", self.figures.get("tokens", 0.0)) > 0


FIGURE_NAMES = {"kl": "KL", "mean": "mean difference", "worst": "worst difference"}
"""Names of the limited figures in messages."""


NOTHING = "nothing could be compared"
"""Text of a comparison without a value that both engines have."""


def compare_engines(
    ours: Sequence[Observation], theirs: Sequence[Observation], tolerance: Tolerance, *, answers: bool = True
) -> list[Comparison]:
    """Return the comparisons of two engines; no figure counts a value that one side lacks.

    The prompts must be shown to be equal, as texts or as tokens, and with `answers` the weights: by a log-probability
    that both have, or by equal greedy answers.
    """
    pairs = [_aligned(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert all(a.name == b.name for a, b in pairs), "the same conversations"
    prompts, tokens = _prompts(pairs), _tokens(pairs)
    logprobs, greedy = _logprobs(pairs, tolerance), _greedy(pairs, tolerance.margin)
    if not prompts.compared and not tokens.compared:
        tokens = replace(tokens, ok=False, what=NOTHING)
    all_equal = greedy.compared and greedy.figures["equal"] == greedy.figures["of"]
    if answers and greedy.ok and not logprobs.compared and not all_equal:
        logprobs = replace(logprobs, ok=False, what=NOTHING)
    return [prompts, tokens, logprobs, greedy, _ends(pairs, tolerance.margin)]


Pair = tuple[Observation, Observation]


def _aligned(a: Observation, b: Observation) -> Pair:
    if not a.trace or not b.trace:
        return a, b
    ours, theirs = aligned(a.trace, b.trace)
    return replace(a, trace=ours), replace(b, trace=theirs)


def _prompts(pairs: Sequence[Pair]) -> Comparison:
    known = [(a.name, a.prompt, b.prompt) for a, b in pairs if a.prompt is not None and b.prompt is not None]
    return _equal("prompt", [(name, a, b, _text_difference) for name, a, b in known])


def _tokens(pairs: Sequence[Pair]) -> Comparison:
    """Compare the ids where both sides have them, else the numbers of tokens."""
    known: list[tuple[str, object, object, Callable[..., str]]] = []
    for a, b in pairs:
        if a.ids is not None and b.ids is not None:
            known.append((a.name, a.ids, b.ids, _id_difference))
        elif a.tokens is not None and b.tokens is not None:
            known.append((a.name, a.tokens, b.tokens, lambda x, y: f"{x} tokens and {y}"))
    return _equal("tokens", known)


def _equal(name: str, known: Sequence[tuple[str, object, object, Callable[..., str]]]) -> Comparison:
    wrong = [(where, describe(a, b)) for where, a, b, describe in known if a != b]
    figures = {"equal": float(len(known) - len(wrong)), "of": float(len(known))}
    return Comparison(name, not wrong, figures, f"«{wrong[0][0]}»: {wrong[0][1]}" if wrong else "")


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
class ComparedToken:
    """One token with its log-probability in both engines, after the same text."""

    where: str
    ours: float
    theirs: float
    kl: float | None

    @property
    def difference(self) -> float:
        """Difference of the log-probabilities in nats, without its sign."""
        return abs(self.ours - self.theirs)

    @property
    def finite(self) -> bool:
        """Whether all its values are numbers."""
        return all(math.isfinite(value) for value in (self.ours, self.theirs, self.kl or 0.0))


def _compared_tokens(pairs: Sequence[Pair]) -> Iterator[ComparedToken]:
    for a, b in pairs:
        if a.scored and b.scored and len(a.scored.top) == len(b.scored.top):  # else the prompts differ in their tokens
            rows = zip(a.scored.logprobs, b.scored.logprobs, a.scored.top, b.scored.top, strict=True)
            for number, (ours, theirs, top, other) in enumerate(rows, 1):
                where = f"«{a.name}», token {number} of the given answer"
                yield ComparedToken(where, ours, theirs, divergence(dict(top), dict(other)))
        if a.trace and b.trace:
            for number, (x, y) in enumerate(zip(a.trace.steps, b.trace.steps, strict=False), 1):
                if x.logprob is not None and y.logprob is not None and x.tokens == y.tokens == 1 and x.text == y.text:
                    kl = divergence(dict(x.top), dict(y.top)) if x.top and y.top else None
                    yield ComparedToken(f"«{a.name}», step {number} ({x.text!r})", x.logprob, y.logprob, kl)
                if x.text != y.text:
                    yield from _at_difference(f"«{a.name}», step {number}", x, y)
                    break


def _at_difference(where: str, x: Step, y: Step) -> Iterator[ComparedToken]:
    """Compare the candidates of the first different step: the text before it is equal.

    Compared is the best token of one side that is a candidate of the other side too.
    """
    if x.top and y.top:
        ours, theirs = dict(x.top), dict(y.top)
        common = [text for text in (x.top[0][0], y.top[0][0]) if text in ours and text in theirs]
        for text in common[:1]:
            yield ComparedToken(f"{where} ({text!r})", ours[text], theirs[text], divergence(ours, theirs))


def _logprobs(pairs: Sequence[Pair], tolerance: Tolerance) -> Comparison:
    tokens = list(_compared_tokens(pairs))
    if not tokens:
        return Comparison("log-probabilities", ok=True, figures={"tokens": 0.0})
    if broken := next((token for token in tokens if not token.finite), None):
        what = f"at {broken.where} {broken.ours} and {broken.theirs} (KL {broken.kl}), which must be finite"
        return Comparison("log-probabilities", ok=False, figures={"tokens": float(len(tokens))}, what=what)
    kls = [token.kl for token in tokens if token.kl is not None]
    worst = max(tokens, key=lambda token: token.difference)
    figures = {
        "tokens": float(len(tokens)),
        "change": math.fsum(token.theirs - token.ours for token in tokens) / len(tokens),
        "mean": math.fsum(token.difference for token in tokens) / len(tokens),
        "worst": worst.difference,
        **({"kl": math.fsum(kls) / len(kls)} if kls else {}),
    }
    all_limits = {"kl": tolerance.kl, "mean": tolerance.mean, "worst": tolerance.worst}
    limits = {name: limit for name, limit in all_limits.items() if limit is not None and name in figures}
    if not limits:
        return Comparison("log-probabilities", ok=False, figures={"tokens": 0.0}, what=NOTHING)
    # NaN is over every limit, and above NaN is everything.
    over = [name for name, limit in limits.items() if not figures[name] <= limit]
    what = ", ".join(f"{FIGURE_NAMES[name]} {figures[name]:.3g} instead of at most {limits[name]:.3g}" for name in over)
    what += f"; the worst at {worst.where}: {worst.ours:.2f} and {worst.theirs:.2f}" if over else ""
    return Comparison("log-probabilities", not over, {name: round(value, 6) for name, value in figures.items()}, what)


def _first_difference(a: Trace, b: Trace) -> tuple[int, Step | None, Step | None]:
    """The number of equal steps, and the first different step of each side; None where that side has ended."""
    agreed = next(
        (place for place, (x, y) in enumerate(zip(a.steps, b.steps, strict=False)) if x.text != y.text),
        min(len(a.steps), len(b.steps)),
    )
    x, y = (side.steps[agreed] if agreed < len(side.steps) else None for side in (a, b))
    return agreed, x, y


def departure(a: Trace, b: Trace, margin: float | None) -> int | None:
    """Return the number of the first step, from 1, at which two answers differ by more than a near tie; else None."""
    common, x, y = _first_difference(a, b)
    return common + 1 if x and y and not _is_tie(x, y, margin) else None


def _greedy(pairs: Sequence[Pair], margin: float | None) -> Comparison:
    agreed = steps = equal = 0
    wrong = []
    traced = [(a.name, a.trace, b.trace) for a, b in pairs if a.trace and b.trace]
    for name, a, b in traced:
        common, x, y = _first_difference(a, b)
        agreed += common
        steps += max(len(a.steps), common + (x is not None))
        equal += x is None and y is None
        if x is not None and y is not None and EOS_TEXT not in (x.text, y.text) and not _is_tie(x, y, margin):
            by = "" if x.margin is None else f", preferred by {x.margin:.2f}"
            wrong.append(f"«{name}»: after {common} equal steps {x.text!r}{by}, and {y.text!r}")
    figures = {"agreed": float(agreed), "steps": float(steps), "equal": float(equal), "of": float(len(traced))}
    return Comparison("greedy answer", not wrong, figures, wrong[0] if wrong else "")


def _is_tie(x: Step, y: Step, margin: float | None) -> bool:
    """Whether a tolerated difference could have made one side choose the other side's token.

    Of EOS the margin of the two best tokens counts: not every engine lists EOS among the candidates.
    """
    distances = (x.distance(y), y.distance(x))
    if EOS_TEXT in (x.text, y.text):
        distances = (x.margin, y.margin)
    return margin is None or any(value is not None and value <= margin for value in distances)


def _ends(pairs: Sequence[Pair], margin: float | None) -> Comparison:
    """Whether both sides end: after a given answer, and where the greedy answer of one side ends."""
    compared = 0
    wrong = []
    for a, b in pairs:
        if a.scored and b.scored:
            compared += 1
            x, y = (_last(side.scored) for side in (a, b) if side.scored)
            if x[0] != y[0] and margin is not None and not any(value <= margin for value in (x[1], y[1])):
                wrong.append(f"«{a.name}», behind the given answer: {_ending(x[0])} and {_ending(y[0])}")
        if a.trace and b.trace:
            compared += 1
            common, s, t = _first_difference(a.trace, b.trace)
            at_end = (s is not None and s.text == EOS_TEXT) != (t is not None and t.text == EOS_TEXT)
            if at_end and not (s and t and _is_tie(s, t, margin)) and margin is not None:
                ended = [_ending(bool(step and step.text == EOS_TEXT)) for step in (s, t)]
                wrong.append(f"«{a.name}», after {common} equal steps: {ended[0]} and {ended[1]}")
    figures = {"equal": float(compared - len(wrong)), "of": float(compared)}
    return Comparison("end", not wrong, figures, wrong[0] if wrong else "")


def _last(score: "Score") -> tuple[bool, float]:
    """Whether EOS is the most probable token after a given answer, and the margin of the most probable token."""
    (_, first), (_, second) = score.top[-1][:2]
    return score.logprobs[-1] >= first, first - second


def _ending(ends: bool) -> str:  # noqa: FBT001
    return "one ends" if ends else "one goes on"
