"""stages/evaluate/references.py: means, controls and changes of the overlap, with missing answers."""

from typing import Any

from tutor.stages.evaluate.references import control_findings, reference_change, reference_findings, reference_summary

PROMPTS = [{"instruction": f"p{number}", "reference": f"r{number}"} for number in range(8)]


def records(values: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"error": "x"} if value is None else {"verdicts": {"chrf": value, "chrf_other": value / 2}} for value in values
    ]


def test_summary_has_the_mean_and_the_control() -> None:
    found = reference_summary(PROMPTS, records([20.0, 30.0] * 4), seed=1)
    assert found is not None
    assert (found["n"], found["mean"]) == (8, 25.0)
    assert 20 <= found["low"] < 25 < found["high"] <= 30
    assert (found["control"]["before"], found["control"]["after"]) == (12.5, 25.0)
    assert found["control"]["conclusion"] == "better"
    (finding,) = control_findings("tutor", {"reference": found})
    assert finding["text"].startswith(
        "tutor, chrF with the references of other prompts, and with its own: 12.5, then 25.0"
    )


def test_missing_answer_counts_as_no_overlap() -> None:
    found = reference_summary(PROMPTS, records([40.0] * 4 + [None] * 4), seed=1)
    assert found is not None
    assert (found["n"], found["mean"]) == (8, 20.0)


def test_change_is_paired_by_prompt() -> None:
    found = reference_change(PROMPTS, records([10.0, 50.0] * 4), records([14.0, 54.0] * 4), seed=1)
    assert found is not None
    assert (found["difference"], found["low"], found["high"], found["conclusion"]) == (4.0, 4.0, 4.0, "better")
    text = reference_findings("base to tutor", {"reference": found})[0]["text"]
    assert text == "base to tutor, chrF to its reference: 30.0, then 34.0 (+4.0, +4.0 to +4.0): better"


def test_few_references_have_no_interval_and_none_no_figures() -> None:
    prompts = [*PROMPTS[:2], *({"instruction": "x", "reference": ""} for _ in range(6))]
    found = reference_change(prompts, records([10.0] * 8), records([90.0] * 8), seed=1)
    assert found is not None
    assert (found["n"], found["low"], found["conclusion"]) == (2, None, "no difference shown")
    assert reference_summary(prompts[2:], records([1.0] * 6), seed=1) is None
    assert reference_findings("a to b", {"reference": None}) == control_findings("a", {}) == []


def test_answers_graded_before_references_are_left_out() -> None:
    old = [{"verdicts": {"language": True}}] * 8
    assert reference_change(PROMPTS, old, records([10.0] * 8), seed=1) is None
