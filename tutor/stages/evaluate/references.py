"""Overlap with the reference answers as figures: the mean of a model with its interval, and the change between models.

In: prompts with a `reference`, records with `chrf` and `chrf_other` among their verdicts (graders/reference.py). Out:
JSON values, None where no prompt has a reference. A missing answer has an overlap of 0. Grades no answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.intervals import Difference, conclude, paired_values
from tutor.graders.labels import REFERENCE_LABEL

Json = Mapping[str, Any]


def reference_summary(prompts: Sequence[Json], records: Sequence[Json], seed: int) -> dict[str, Any] | None:
    """Return the mean overlap with the own references, with its interval, and with those of other prompts.

    `n`: prompts with a reference; `mean`, `low`, `high`: of chrF, 0 to 100; `control`: the change from the references
    of other prompts to the own ones, None for a single reference. An answer to the question is nearer to its own.
    """
    places = _places(prompts, records)
    if not places:
        return None
    own = _scores(records, places, "chrf")
    mean = paired_values([0.0] * len(own), own, seed)
    found = {"n": mean.n, "mean": round(mean.mean, 2), "low": _rounded(mean.low), "high": _rounded(mean.high)}
    one_reference = len({prompts[place]["reference"] for place in places}) < 2
    return {**found, "control": None if one_reference else _change(_scores(records, places, "chrf_other"), own, seed)}


def reference_change(
    prompts: Sequence[Json], before: Sequence[Json], after: Sequence[Json], seed: int
) -> dict[str, Any] | None:
    """Return the change of the overlap with the own references from one model to another, paired by prompt."""
    places = [place for place in _places(prompts, before) if place in set(_places(prompts, after))]
    if not places:
        return None
    return _change(_scores(before, places, "chrf"), _scores(after, places, "chrf"), seed)


def reference_findings(names: str, changed: Json) -> list[dict[str, str]]:
    """Return the change between two models as a finding; none without references."""
    entry = changed.get("reference")
    return [_finding(f"{names}, {REFERENCE_LABEL}", entry)] if entry else []


def control_findings(model: str, summary: Json) -> list[dict[str, str]]:
    """Return whether a model's answers are nearer to their own references than to others; none without references."""
    control = (summary.get("reference") or {}).get("control")
    return (
        [_finding(f"{model}, chrF with the references of other prompts, and with its own", control)] if control else []
    )


def _finding(what: str, entry: Json) -> dict[str, str]:
    interval = "" if entry["low"] is None else f", {entry['low']:+.1f} to {entry['high']:+.1f}"
    text = f"{what}: {entry['before']:.1f}, then {entry['after']:.1f} ({entry['difference']:+.1f}{interval})"
    return {"conclusion": entry["conclusion"], "text": f"{text}: {entry['conclusion']}"}


def _places(prompts: Sequence[Json], records: Sequence[Json]) -> list[int]:
    """Prompts with a reference whose answers were compared with it, or that have no answer."""
    return [
        place
        for place, (prompt, record) in enumerate(zip(prompts, records, strict=True))
        if prompt.get("reference") and ("chrf" in record.get("verdicts", {}) or "error" in record)
    ]


def _scores(records: Sequence[Json], places: Sequence[int], name: str) -> list[float]:
    return [records[place].get("verdicts", {}).get(name) or 0.0 for place in places]


def _change(before: Sequence[float], after: Sequence[float], seed: int) -> dict[str, Any]:
    found: Difference = paired_values(before, after, seed)
    return {
        "n": found.n,
        "before": round(sum(before) / found.n, 2),
        "after": round(sum(after) / found.n, 2),
        "difference": round(found.mean, 2),
        "low": _rounded(found.low),
        "high": _rounded(found.high),
        "better": found.higher,
        "worse": found.lower,
        "conclusion": conclude(found),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
