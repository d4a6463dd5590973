"""serving/evaluation/decision.py: the measure, the best and the cheapest way, and whether fine-tuning pays."""

import json

import pytest

from tutor.serving.evaluation.decision import Measure, Scored, choose_measure, decide, scores


def way(name: str, passed: int, of: int = 20, seconds: float = 1.0) -> Scored:
    """A way whose first answers pass, so that a better way passes all that a worse one does."""
    return Scored(name, [1.0] * passed + [0.0] * (of - passed), seconds, tuned=name == "tutor")


def test_measure_depends_on_the_prompts_alone() -> None:
    asked = {"instruction": "¿?", "expect": {}, "reference": ""}
    assert choose_measure([asked, {**asked, "expect": {"code": True}, "reference": "Sí."}]) == "passed"
    assert choose_measure([asked, {**asked, "reference": "Sí."}]) == "chrf"
    assert choose_measure([asked]) == "form"


def test_scores_of_chrf_leave_out_prompts_without_reference() -> None:
    prompts = [{"reference": "Sí."}, {"reference": ""}, {"reference": "No."}]
    records = [{"passed": True, "verdicts": {"chrf": 61.5}}, {"passed": True, "verdicts": {}}, {"passed": False}]
    assert scores(prompts, records, "chrf") == [61.5, 0.0]
    assert scores(prompts, records, "passed") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("ways", "outcome", "best", "cheapest", "end"),
    [
        (
            [way("base", 2), way("base + 3 examples", 6, seconds=3), way("tutor", 16, seconds=2)],
            "tune",
            "tutor",
            "tutor",
            "fine-tuning pays: tutor is shown to be better than every way without training.",
        ),
        (
            [way("base", 2), way("base + 3 examples", 12, seconds=3), way("tutor", 12, seconds=2)],
            "do not tune",
            "tutor",
            "tutor",
            "do not tune: base + 3 examples does at least as well as tutor (12 of 20 against 12 of 20).",
        ),
        (
            [way("base", 11), way("base + 3 examples", 12, seconds=3), way("tutor", 3, seconds=2)],
            "do not tune",
            "base + 3 examples",
            "base",
            "do not tune: base + 3 examples does at least as well as tutor (12 of 20 against 3 of 20).",
        ),
        (
            [way("base", 2), way("base + 3 examples", 12, seconds=3), way("tutor", 14, seconds=2)],
            "not shown",
            "tutor",
            "tutor",
            "20 prompts do not tell tutor from base + 3 examples (+10 points, -5 to +25).",
        ),
        (
            [way("base", 0), way("base + 3 examples", 0, seconds=3), way("tutor", 0, seconds=2)],
            "nothing shown",
            "base",
            "base",
            "Nothing shown: no answer of any way to 20 prompts scores, so they decide nothing.",
        ),
    ],
)
def test_decision_names_the_best_and_the_cheapest_way(
    ways: list[Scored], outcome: str, best: str, cheapest: str, end: str
) -> None:
    found = decide(ways, "passed", seed=1)
    assert (found["outcome"], found["best"], found["cheapest"]) == (outcome, best, cheapest)
    assert found["sentence"].endswith(end)
    assert set(found["to_tuned"]) == {"base", "base + 3 examples"}
    json.dumps(found, allow_nan=False)


def test_one_rival_without_an_interval_above_zero_is_enough() -> None:
    """Fine-tuning must win against every way: that it wins against the base alone is not the question."""
    found = decide([way("base", 0), way("base + 5 similar rows", 15), way("tutor", 17)], "passed", seed=1)
    assert found["to_tuned"]["base"]["conclusion"] == "better"
    assert found["outcome"] == "not shown"


@pytest.mark.parametrize("measure", ["chrf"])
def test_few_references_give_no_interval_and_no_proof(measure: Measure) -> None:
    found = decide([Scored("base", [10.0] * 5, 1), Scored("tutor", [60.0] * 5, 1, tuned=True)], measure, seed=1)
    assert found["outcome"] == "not shown"
    assert found["sentence"].endswith("do not tell tutor from base (+50, too few for an interval).")
    more = decide([Scored("base", [10.0] * 6, 1), Scored("tutor", [60.0] * 6, 1, tuned=True)], measure, seed=1)
    assert (more["outcome"], more["to_tuned"]["base"]["mean"]) == ("tune", 50.0)
