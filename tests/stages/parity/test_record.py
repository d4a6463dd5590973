"""stages/parity/record.py: observations as JSON and back."""

import json
import math

from support.outputs.observations import observation, scored

from tutor.engines.trace import Step, Trace
from tutor.stages.parity.record import from_record, to_record


def test_record_with_candidates_gives_back_the_observation() -> None:
    first = observation(scored=None)
    assert from_record(json.loads(json.dumps(to_record(first, candidates=True)))) == first
    short = json.loads(json.dumps(to_record(observation(), candidates=False)))
    assert "top" not in short["trace"]["steps"][0]
    assert short["logprobs"] == [-0.5, -0.3]


def test_record_of_numbers_that_are_not_finite_is_json() -> None:
    step = Step(" a", math.nan, ((" a", -0.1), (" b", -math.inf)))
    record = to_record(observation(scored=scored(-0.5, math.nan), trace=Trace((step,), None, 3)), candidates=True)
    json.dumps(record, allow_nan=False)
    assert record["logprobs"] == [-0.5, None]
    assert record["trace"]["steps"][0]["logprob"] is None
