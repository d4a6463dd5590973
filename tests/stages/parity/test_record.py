"""stages/parity/record.py: observations as JSON and back."""

import json

from support.outputs.observations import observation

from tutor.stages.parity.record import from_record, to_record


def test_record_with_candidates_gives_back_the_observation() -> None:
    first = observation(scored=None)
    assert from_record(json.loads(json.dumps(to_record(first, candidates=True)))) == first
    short = json.loads(json.dumps(to_record(observation(), candidates=False)))
    assert "top" not in short["trace"]["steps"][0]
    assert short["logprobs"] == [-0.5, -0.3]
