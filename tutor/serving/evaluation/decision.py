"""Decide whether fine-tuning pays, from one measure of several ways to get an answer.

In: held-out prompts; of each way, a score a prompt and its mean seconds an answer. Out: the best way, the cheapest that
is not shown to be worse, whether the tuned model is shown to be better than every way without training, and one
sentence of it. Asks no model and grades no answer.

The measure depends on the prompts alone, so it is fixed before any model answers: `passed` where a prompt states an
expectation; else chrF, where prompts have references; else `passed`, which then is form and language alone.
"Fine-tuning pays" needs an interval above zero against every untuned way, so no correction for several comparisons is
needed. Without that, an untuned way that does at least as well is a reason not to tune.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tutor.graders.intervals import Difference, conclude, paired_values, paired_verdicts
from tutor.graders.verdict import any_expectation

Measure = Literal["passed", "chrf", "form"]
"""passed: all that was asked; chrf: overlap with the reference, 0 to 100; form: passed, where no prompt asks more."""
Outcome = Literal["tune", "do not tune", "not shown", "nothing shown"]


@dataclass(frozen=True)
class Scored:
    """One way to get an answer: a score a prompt, in the order of the prompts, and what an answer costs."""

    name: str
    scores: Sequence[float]  # 1 or 0, or chrF
    seconds: float  # mean of an answer; infinite without any answer
    tuned: bool = False

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)


def choose_measure(prompts: Sequence[Mapping[str, Any]]) -> Measure:
    """Return the measure that decides for these prompts."""
    if any_expectation(prompts):
        return "passed"
    return "chrf" if any(prompt.get("reference") for prompt in prompts) else "form"


def scores(prompts: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], measure: Measure) -> list[float]:
    """Return the score of each answer; of chrF only those of prompts with a reference. A missing answer has 0."""
    if measure != "chrf":
        return [float(record["passed"]) for record in records]
    compared = [record for prompt, record in zip(prompts, records, strict=True) if prompt.get("reference")]
    return [float(record.get("verdicts", {}).get("chrf") or 0.0) for record in compared]


def decide(ways: Sequence[Scored], measure: Measure, seed: int) -> dict[str, Any]:
    """Return the decision as JSON values.

    `best`: the way with the highest mean, of equal ones the cheapest; `cheapest`: that with the least seconds an answer
    whose interval from the best includes zero; `outcome` and `sentence`; `from_best` and `to_tuned`: by way, its
    difference from the best way, and that of the tuned model from it. One of the ways is tuned.
    """
    best = min(ways, key=lambda way: (-way.mean, way.seconds))
    from_best = {way.name: _difference(best, way, measure, seed) for way in ways}
    equal = [way for way in ways if conclude(from_best[way.name]) != "worse"]
    cheapest = min(equal, key=lambda way: way.seconds)
    tuned = next(way for way in ways if way.tuned)
    to_tuned = {way.name: _difference(way, tuned, measure, seed) for way in ways if not way.tuned}
    outcome, reason = _outcome(ways, tuned, to_tuned, measure)
    named = "" if outcome == "nothing shown" else f"{_named(ways, best, cheapest, measure)}; "
    return {
        "measure": measure,
        "n": len(tuned.scores),
        "best": best.name,
        "cheapest": cheapest.name,
        "outcome": outcome,
        "sentence": _sentence(named + reason),
        "from_best": {name: _as_json(found) for name, found in from_best.items() if name != best.name},
        "to_tuned": {name: _as_json(found) for name, found in to_tuned.items()},
    }


def _named(ways: Sequence[Scored], best: Scored, cheapest: Scored, measure: Measure) -> str:
    """The best and the cheapest way."""
    text = f"best: {best.name} ({_score(best, measure)}, {best.seconds:.1f} s an answer)"
    if cheapest is not best:
        cost = f"{_score(cheapest, measure)}, {cheapest.seconds:.1f} s"
        return f"{text}; cheapest and not shown to be worse: {cheapest.name} ({cost})"
    if best.seconds == min(way.seconds for way in ways):
        return f"{text}, and the cheapest"
    return f"{text}; every cheaper way is shown to be worse"


def _difference(before: Scored, after: Scored, measure: Measure, seed: int) -> Difference:
    if measure == "chrf":
        return paired_values(before.scores, after.scores, seed)
    early, late = ([score > 0 for score in way.scores] for way in (before, after))
    return paired_verdicts(early, late, seed)


def _outcome(
    ways: Sequence[Scored], tuned: Scored, to_tuned: Mapping[str, Difference], measure: Measure
) -> tuple[Outcome, str]:
    """The outcome, and the last part of the sentence."""
    prompts = f"{len(tuned.scores)} prompts"
    if not any(way.mean for way in ways):
        return "nothing shown", f"nothing shown: no answer of any way to {prompts} scores, so they decide nothing"
    rivals = [way for way in ways if not way.tuned and conclude(to_tuned[way.name]) != "better"]
    if not rivals:
        return "tune", f"fine-tuning pays: {tuned.name} is shown to be better than every way without training"
    rival = min(rivals, key=lambda way: (-way.mean, way.seconds))
    if rival.mean >= tuned.mean:
        against = f"{_score(rival, measure)} against {_score(tuned, measure)}"
        return "do not tune", f"do not tune: {rival.name} does at least as well as {tuned.name} ({against})"
    interval = _interval(to_tuned[rival.name], measure)
    reason = f"{prompts} do not tell {tuned.name} from {rival.name} ({interval})"
    return "not shown", f"whether fine-tuning pays is not shown: {reason}"


def _score(way: Scored, measure: Measure) -> str:
    if measure == "chrf":
        return f"chrF {way.mean:.1f}"
    return f"{sum(score > 0 for score in way.scores)} of {len(way.scores)}"


def _interval(found: Difference, measure: Measure) -> str:
    scale, unit = (1, "") if measure == "chrf" else (100, " points")
    if found.low is None or found.high is None:
        return f"{scale * found.mean:+.0f}{unit}, too few for an interval"
    return f"{scale * found.mean:+.0f}{unit}, {scale * found.low:+.0f} to {scale * found.high:+.0f}"


def _as_json(found: Difference) -> dict[str, Any]:
    rounded = {name: value if value is None else round(value, 4) for name, value in asdict(found).items()}
    return {**rounded, "conclusion": conclude(found)}


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
