"""The record of the parity stage: what each engine made of the conversations, as JSON that later comparisons read."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tutor.engines.trace import Step, Trace
from tutor.stages.parity.compare import Seen

REFERENCE = "reference.json"
"""Name of the record's file in the stage's folder."""


def to_record(seen: Seen, *, candidates: bool) -> dict[str, Any]:
    """What one engine made of a conversation, for JSON; with what else each step of its answer could have been, or not.

    The candidates of a given answer's tokens, which are many, are never kept.
    """
    trace = asdict(seen.trace) if seen.trace else None
    for step in trace["steps"] if trace and not candidates else ():
        del step["top"]
    scored = [round(value, 6) for value in seen.scored.logprobs] if seen.scored else None
    record = {"name": seen.name, "prompt": seen.prompt, "ids": seen.ids, "tokens": seen.tokens, "logprobs": scored}
    return {**record, "trace": trace}


def from_record(record: Mapping[str, Any]) -> Seen:
    """What `to_record` wrote with candidates; the given answer's log-probabilities, which have none, stay out."""
    trace = record["trace"]
    steps = tuple(
        Step(step["text"], step["logprob"], tuple((text, value) for text, value in step["top"]), step["tokens"])
        for step in (trace["steps"] if trace else ())
    )
    found = Trace(steps, trace["finish"], trace["prompt_tokens"]) if trace else None
    return Seen(record["name"], record["prompt"], tuple(record["ids"]), record["tokens"], None, found)
