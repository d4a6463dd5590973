"""stages/evaluate/rates.py: rates and changes from verdicts."""

import json

from support.outputs.records import FAILED, PROMPTS, record

from tutor.stages.evaluate.rates import change, changes, rates, summarise


def test_rate_has_count_and_interval_and_counts_errors() -> None:
    counted = rates([record(), record(in_language=False), FAILED])
    assert (counted["n"], counted["errors"]) == (3, 1)
    assert counted["language"] == {"n": 1, "share": 0.3333, "low": 0.0615, "high": 0.7923}
    assert counted["answered"]["n"] == counted["passed"]["n"] == 2
    assert "compiles" not in counted, "no answer was judged for it"


def test_no_prompts_give_zero_rates() -> None:
    assert rates([])["passed"] == {"n": 0, "share": 0.0, "low": 0.0, "high": 1.0}
    assert summarise([], [])["tokens_per_second"] is None
    assert changes([], [], [], 1)["all"]["passed"]["conclusion"] == "no difference shown"


def test_summary_has_categories_median_speed_and_length() -> None:
    records = [record(speed=speed) for speed in (10.0, 30.0, 50.0)] + [record(tokens=1, speed=9999.0)]
    summary = summarise(PROMPTS[:4], records)
    assert {name: part["n"] for name, part in summary["categories"].items()} == {"definicion": 2, "ejemplo": 2}
    assert summary["all"]["n"] == 4
    assert summary["tokens_per_second"] == 30.0
    assert summary["characters"] == 100


def test_failed_answer_is_left_out_of_the_medians() -> None:
    records = [record(tokens=2, speed=10.126), FAILED, record(tokens=1, speed=99.0)]
    summary = summarise(PROMPTS[:3], records)
    assert (summary["tokens_per_second"], summary["characters"]) == (10.13, 100)
    assert list(summary["categories"]) == ["definicion", "ejemplo"], "by name, not as they come"


def test_verdict_missing_in_one_answer_is_not_counted() -> None:
    compiled = record()
    compiled["verdicts"]["compiles"] = True
    assert "compiles" not in rates([compiled, record()])
    for before, after in ((compiled, record()), (record(), compiled)):
        found = changes(PROMPTS[:1], [before], [after], 7)
        assert "compiles" not in {**found["all"], **found["kinds"]}


def test_better_and_worse_list_prompts_that_one_model_passes() -> None:
    early = [record(passed=passed) for passed in (True, True, False, False)]
    late = [record(passed=passed) for passed in (True, False, True, False)]
    found = changes(PROMPTS[:4], early, late, 7)
    assert (found["better"], found["worse"]) == (["¿2?"], ["¿1?"])


def test_figures_of_a_change_are_rounded_to_four_digits() -> None:
    found = change([record(passed=number > 30) for number in range(70)], [record()] * 70, "passed", 7)
    figures = [found[name] for name in ("low", "difference", "high")]
    assert figures == [round(round(70 * figure) / 70, 4) for figure in figures]
    assert 0 < found["low"] < found["difference"] == 0.4429 < found["high"] < 1


def test_changes_are_over_all_and_by_kind_with_prompts() -> None:
    before = [record(passed=number == 0) for number in range(20)]
    after = [record(passed=number % 2 == 1, in_language=False) for number in range(20)]
    found = changes(PROMPTS, before, after, 7)
    assert found["all"]["passed"]["before"]["n"] == 1
    assert (found["all"]["passed"]["difference"], found["all"]["passed"]["conclusion"]) == (0.45, "better")
    assert found["all"]["language"]["conclusion"] == "worse"
    assert found["categories"]["definicion"]["conclusion"] == "better"
    assert found["kinds"]["passed"] == found["categories"]
    assert set(found["kinds"]["language"]) == {"definicion", "ejemplo"}
    assert found["categories"]["ejemplo"]["conclusion"] == "no difference shown"
    assert found["worse"] == ["¿0?"]
    assert len(found["better"]) == 10
    json.dumps(found, allow_nan=False)


def test_missing_answer_counts_as_failed_in_a_change() -> None:
    found = change([record()] * 9, [FAILED] * 9, "passed", 7)
    assert (found["better"], found["worse"], found["conclusion"]) == (0, 9, "worse")
    assert change([record()] * 9, [FAILED] * 9, "language", 7)["conclusion"] == "worse"
