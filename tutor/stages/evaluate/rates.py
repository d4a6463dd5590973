"""Verdicts as figures: rates with their intervals, by kind of question, and what changed between two models.

Helper of the evaluate stage. In: prompts with their category, records with their verdicts (graders/verdict.py). Out:
JSON values: a rate is `n` of the prompts with its `share` and the `low` and `high` of its 95 % interval; a difference
has the two shares, their difference with its interval, how many prompts changed each way, and `said`.
"""

import statistics as figures
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.verdict import LABELS
from tutor.stages.evaluate.intervals import paired_verdicts, said, wilson

Record = Mapping[str, Any]

BY_KIND = ("passed", "spanish", "stopped", "compiles")
"""Whose changes are counted by kind of question, too: a small model may pass nothing whole and have learnt much."""


def summarise(prompts: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> dict[str, Any]:
    """Rates over all prompts and by category, median characters and median speed in tokens/s (None: no answer)."""
    answers = [record for record in records if "verdicts" in record]
    speeds = [record["tokens_per_second"] for record in answers if record["tokens"] > 1]
    lengths = [record["verdicts"]["characters"] for record in answers]
    return {
        "all": rates(records),
        "categories": {name: rates([records[place] for place in places]) for name, places in _kinds(prompts).items()},
        "characters": round(figures.median(lengths)) if lengths else None,
        "tokens_per_second": round(figures.median(speeds), 2) if speeds else None,
    }


def rates(records: Sequence[Record]) -> dict[str, Any]:
    """How many prompts, errors and, for each verdict, passes with share and interval; no answer passes nothing."""
    counted = _counted(records)
    return {
        "n": len(records),
        "errors": sum("error" in record for record in records),
        **{name: rate(sum(_held(record, name) for record in records), len(records)) for name in counted},
    }


def rate(passed: int, n: int) -> dict[str, Any]:
    """A rate as JSON has it."""
    low, high = wilson(passed, n)
    share = round(passed / n, 4) if n else 0.0
    return {"n": passed, "share": share, "low": round(low, 4), "high": round(high, 4)}


def differences(
    prompts: Sequence[Mapping[str, Any]], before: Sequence[Record], after: Sequence[Record], seed: int
) -> dict[str, Any]:
    """What changed from one model's records to another's over the same prompts.

    `all`: every verdict; `categories`: `passed` by kind of question, `kinds`: each of BY_KIND so; `better` and
    `worse`: the questions that only one passes.
    """
    common = [name for name in _counted(before) if name in _counted(after)]
    won = [_held(record, "passed") for record in after]
    lost = [_held(record, "passed") for record in before]
    places = range(len(prompts))
    kinds = {
        name: {
            kind: difference([before[at] for at in members], [after[at] for at in members], name, seed)
            for kind, members in _kinds(prompts).items()
        }
        for name in BY_KIND
        if name in common
    }
    return {
        "all": {name: difference(before, after, name, seed) for name in common},
        "categories": kinds["passed"],
        "kinds": kinds,
        "better": [prompts[at]["instruction"] for at in places if won[at] and not lost[at]],
        "worse": [prompts[at]["instruction"] for at in places if lost[at] and not won[at]],
    }


def difference(before: Sequence[Record], after: Sequence[Record], name: str, seed: int) -> dict[str, Any]:
    """What changed in one verdict, over records in the same order."""
    early, late = ([_held(record, name) for record in records] for records in (before, after))
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
        "said": said(found),
    }


def _held(record: Record, name: str) -> bool:
    return bool(record["passed"] if name == "passed" else record.get("verdicts", {}).get(name, False))


def _counted(records: Sequence[Record]) -> list[str]:
    """The verdicts that every answer has."""
    verdicts = [record["verdicts"] for record in records if "verdicts" in record]
    return [name for name in LABELS if name == "passed" or all(name in verdict for verdict in verdicts)]


def _kinds(prompts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        kinds.setdefault(prompt["category"], []).append(place)
    return dict(sorted(kinds.items()))
