"""Verdicts as figures: rates with their intervals, by kind of question, and the change from one model to another.

In: prompts with their category, records with their verdicts (graders/verdict.py). Out: JSON values. A rate has the
number `n` of passed prompts, its `share`, and the `low` and `high` end of its 95 % interval. A change has the rate
`before` and `after`, their `difference` with its interval, the number of prompts `better` and `worse`, and the
`conclusion`. Grades no answer.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.intervals import conclude, paired_verdicts, wilson
from tutor.graders.labels import LABELS
from tutor.stages.evaluate.references import reference_change, reference_summary

BY_KIND = ("passed", "language", "ended", "compiles")
"""Verdicts whose changes are also counted by kind of question: a small model can improve and still pass no prompt."""


def summarise(
    prompts: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any]:
    """Return rates over all prompts and by category, median characters and median tokens/s (None: no answer).

    `reference`: the overlap with the reference answers (references.py), with intervals of this seed.
    """
    answers = [record for record in records if "verdicts" in record]
    speeds = [record["tokens_per_second"] for record in answers if record["tokens"] > 1]
    lengths = [record["verdicts"]["characters"] for record in answers]
    return {
        "all": rates(records),
        "categories": {name: rates([records[place] for place in places]) for name, places in _kinds(prompts).items()},
        "reference": reference_summary(prompts, records, seed),
        "characters": round(statistics.median(lengths)) if lengths else None,
        "tokens_per_second": round(statistics.median(speeds), 2) if speeds else None,
    }


def rates(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of prompts and of errors, and a rate for each verdict; a missing answer passes no verdict."""
    counted = _counted(records)
    return {
        "n": len(records),
        "errors": sum("error" in record for record in records),
        **{name: rate(sum(_passes(record, name) for record in records), len(records)) for name in counted},
    }


def rate(passed: int, n: int) -> dict[str, Any]:
    """Return a rate as JSON values."""
    low, high = wilson(passed, n)
    share = round(passed / n, 4) if n else 0.0
    return {"n": passed, "share": share, "low": round(low, 4), "high": round(high, 4)}


def changes(
    prompts: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Return the changes from one model's records to another's over the same prompts.

    `all`: the change of every verdict; `categories`: of `passed` by kind of question; `kinds`: of each verdict in
    BY_KIND by kind of question; `reference`: of the overlap with the reference answers (references.py); `better` and
    `worse`: the questions that only one model passes.
    """
    common = [name for name in _counted(before) if name in _counted(after)]
    passes_before, passes_after = ([_passes(record, "passed") for record in records] for records in (before, after))
    places = range(len(prompts))
    kinds = {
        name: {
            kind: change([before[at] for at in members], [after[at] for at in members], name, seed)
            for kind, members in _kinds(prompts).items()
        }
        for name in BY_KIND
        if name in common
    }
    return {
        "all": {name: change(before, after, name, seed) for name in common},
        "categories": kinds["passed"],
        "kinds": kinds,
        "reference": reference_change(prompts, before, after, seed),
        "better": [prompts[at]["instruction"] for at in places if passes_after[at] and not passes_before[at]],
        "worse": [prompts[at]["instruction"] for at in places if passes_before[at] and not passes_after[at]],
    }


def change(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], name: str, seed: int
) -> dict[str, Any]:
    """Return the change of one verdict, over records of the same prompts in the same order."""
    early, late = ([_passes(record, name) for record in records] for records in (before, after))
    found = paired_verdicts(early, late, seed)
    return {
        "n": found.n,
        "before": rate(sum(early), found.n),
        "after": rate(sum(late), found.n),
        "difference": round(found.mean, 4),
        "low": None if found.low is None else round(found.low, 4),
        "high": None if found.high is None else round(found.high, 4),
        "better": found.higher,
        "worse": found.lower,
        "conclusion": conclude(found),
    }


def _passes(record: Mapping[str, Any], name: str) -> bool:
    return bool(record["passed"] if name == "passed" else record.get("verdicts", {}).get(name, False))


def _counted(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdicts that every answer has."""
    verdicts = [record["verdicts"] for record in records if "verdicts" in record]
    return [name for name in LABELS if name == "passed" or all(name in verdict for verdict in verdicts)]


def _kinds(prompts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The prompts' places by category."""
    kinds: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        kinds.setdefault(prompt["category"], []).append(place)
    return dict(sorted(kinds.items()))
