"""Observations as JSON: the record of the parity stage, with which the published model is compared.

In: observations. Out: the values of reference.json, and observations again. Reads and writes no file.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tutor.engines.trace import Step, Trace
from tutor.stages.parity.compare import Observation

REFERENCE = "reference.json"
"""File name of the record in the stage's folder."""


def to_record(observation: Observation, *, candidates: bool) -> dict[str, Any]:
    """Return an observation as JSON values, with or without the candidates of each step of the greedy answer.

    The candidates of a given answer's tokens are left out: they are many. A number that is not finite, which JSON
    cannot hold, is None; the gate refuses it.
    """
    trace = asdict(observation.trace) if observation.trace else None
    for step in trace["steps"] if trace else ():
        step["logprob"] = _finite(step["logprob"])
        step["top"] = [(text, value) for text, value in step["top"] if math.isfinite(value)]
        if not candidates:
            del step["top"]
    scored = [_finite(round(value, 6)) for value in observation.scored.logprobs] if observation.scored else None
    record = {
        "name": observation.name,
        "prompt": observation.prompt,
        "ids": observation.ids,
        "tokens": observation.tokens,
        "logprobs": scored,
    }
    return {**record, "trace": trace}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def from_record(record: Mapping[str, Any]) -> Observation:
    """Return the observation of a record with candidates, without the log-probabilities of the given answer."""
    trace = record["trace"]
    steps = tuple(
        Step(step["text"], step["logprob"], tuple((text, value) for text, value in step["top"]), step["tokens"])
        for step in (trace["steps"] if trace else ())
    )
    found = Trace(steps, trace["finish"], trace["prompt_tokens"]) if trace else None
    return Observation(record["name"], record["prompt"], tuple(record["ids"]), record["tokens"], None, found)
