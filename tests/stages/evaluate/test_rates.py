"""Figures from verdicts, and the warnings that must stand beside them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT
from support.files import write_rows

from tutor.errors import DataError, RecipeError
from tutor.graders.verdict import LABELS
from tutor.recipe.settings import Recipe
from tutor.stages.evaluate import generalization
from tutor.stages.evaluate.rates import change, changes, rates, summarise

PROMPTS = [
    {"instruction": f"¿{number}?", "category": "definicion" if number % 2 else "ejemplo"} for number in range(20)
]


def record(*, passed: bool = True, spanish: bool = True, tokens: int = 10, speed: float = 20.0) -> dict[str, Any]:
    verdicts = {**dict.fromkeys(LABELS, True), "spanish": spanish, "characters": 100}
    del verdicts["passed"], verdicts["compiles"], verdicts["expected"], verdicts["usual_length"]
    return {"text": " Sí.", "tokens": tokens, "tokens_per_second": speed, "verdicts": verdicts, "passed": passed}


FAILED = {"error": "timed out", "passed": False}


def test_a_rate_has_its_count_and_interval_and_an_error_passes_nothing() -> None:
    counted = rates([record(), record(spanish=False), FAILED])
    assert (counted["n"], counted["errors"]) == (3, 1)
    assert counted["spanish"] == {"n": 1, "share": 0.3333, "low": 0.0615, "high": 0.7923}
    assert counted["answered"]["n"] == counted["passed"]["n"] == 2
    assert "compiles" not in counted, "no answer was judged for it"


def test_no_prompts_are_no_division() -> None:
    assert rates([])["passed"] == {"n": 0, "share": 0.0, "low": 0.0, "high": 1.0}
    assert summarise([], [])["tokens_per_second"] is None
    assert changes([], [], [], 1)["all"]["passed"]["conclusion"] == "no difference shown"


def test_a_summary_is_by_category_with_the_median_speed_and_length() -> None:
    records = [record(speed=speed) for speed in (10.0, 30.0, 50.0)] + [record(tokens=1, speed=9999.0)]
    summary = summarise(PROMPTS[:4], records)
    assert {name: part["n"] for name, part in summary["categories"].items()} == {"definicion": 2, "ejemplo": 2}
    assert summary["all"]["n"] == 4
    assert summary["tokens_per_second"] == 30.0
    assert summary["characters"] == 100


def test_an_answer_that_failed_has_no_speed_and_no_length() -> None:
    records = [record(tokens=2, speed=10.126), FAILED, record(tokens=1, speed=99.0)]
    summary = summarise(PROMPTS[:3], records)
    assert (summary["tokens_per_second"], summary["characters"]) == (10.13, 100)
    assert list(summary["categories"]) == ["definicion", "ejemplo"], "by name, not as they come"


def test_a_verdict_that_not_every_answer_has_is_not_counted() -> None:
    compiled = record()
    compiled["verdicts"]["compiles"] = True
    assert "compiles" not in rates([compiled, record()])
    for before, after in ((compiled, record()), (record(), compiled)):
        found = changes(PROMPTS[:1], [before], [after], 7)
        assert "compiles" not in {**found["all"], **found["kinds"]}


def test_a_prompt_is_better_or_worse_where_one_side_alone_passes() -> None:
    early = [record(passed=passed) for passed in (True, True, False, False)]
    late = [record(passed=passed) for passed in (True, False, True, False)]
    found = changes(PROMPTS[:4], early, late, 7)
    assert (found["better"], found["worse"]) == (["¿2?"], ["¿1?"])


def test_figures_of_a_difference_are_rounded_to_four_digits() -> None:
    found = change([record(passed=number > 30) for number in range(70)], [record()] * 70, "passed", 7)
    figures = [found[name] for name in ("low", "difference", "high")]
    assert figures == [round(round(70 * figure) / 70, 4) for figure in figures]
    assert 0 < found["low"] < found["difference"] == 0.4429 < found["high"] < 1


def test_a_difference_is_over_all_and_by_kind_and_names_its_prompts() -> None:
    before = [record(passed=number == 0) for number in range(20)]
    after = [record(passed=number % 2 == 1, spanish=False) for number in range(20)]
    found = changes(PROMPTS, before, after, 7)
    assert found["all"]["passed"]["before"]["n"] == 1
    assert (found["all"]["passed"]["difference"], found["all"]["passed"]["conclusion"]) == (0.45, "better")
    assert found["all"]["spanish"]["conclusion"] == "worse"
    assert found["categories"]["definicion"]["conclusion"] == "better"
    assert found["kinds"]["passed"] == found["categories"]
    assert set(found["kinds"]["spanish"]) == {"definicion", "ejemplo"}
    assert found["categories"]["ejemplo"]["conclusion"] == "no difference shown"
    assert found["worse"] == ["¿0?"]
    assert len(found["better"]) == 10
    json.dumps(found, allow_nan=False)


def test_an_answer_that_failed_is_compared_as_one_that_passes_nothing() -> None:
    found = change([record()] * 9, [FAILED] * 9, "passed", 7)
    assert (found["better"], found["worse"], found["conclusion"]) == (0, 9, "worse")
    assert change([record()] * 9, [FAILED] * 9, "spanish", 7)["conclusion"] == "worse"


# Files


def named(folder: Path, **files: str) -> Recipe:
    return Recipe.model_validate({"evaluate": files}).model_copy(update={"path": folder / "r.toml"})


def test_without_files_there_is_nothing_to_read() -> None:
    assert generalization.named_files(Recipe()) == {}
    generalization.check_files(Recipe())


def test_a_file_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.jsonl"):
        generalization.check_files(named(tmp_path, general="none.jsonl"))


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("general", {"text": "dos palabras"}, "is no object with text and language, and nothing else"),
        ("general", {"text": "una", "language": "es"}, "text is a single word"),
        ("general", {"text": "dos palabras", "language": " "}, "language is no text"),
        ("general", {"text": 3, "language": "es"}, "text is no text"),
        ("general", ["a"], "is no object"),
        ("paraphrases", {"original": "¿A?", "instruction": "¿B?", "code": []}, "and nothing else"),
        ("paraphrases", {"original": "¿A?", "instruction": "a\nRespuesta: b"}, "begins with 'Respuesta:'"),
        ("paraphrases", {"original": "¿A?", "instruction": "<think>"}, "holds <think>"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, row: Any, why: str) -> None:
    good = {"text": "dos palabras", "language": "es"} if name == "general" else {"original": "¿?", "instruction": "¿!?"}
    write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        generalization.check_files(named(tmp_path, **{name: "rows.jsonl"}))
    assert caught.value.problems[0].startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert why in caught.value.problems[0]


def test_the_files_of_the_project_are_good_and_every_paraphrase_belongs_to_a_prompt() -> None:
    recipe = named(ROOT / "data", paraphrases="paraphrases.jsonl", general="general.jsonl")
    generalization.check_files(recipe)
    prompts = [json.loads(line) for line in (ROOT / "data" / "eval.jsonl").read_text("utf-8").splitlines()]
    rows = generalization.read_texts(ROOT / "data" / "paraphrases.jsonl", generalization.PARAPHRASE_KEYS)
    reworded = generalization.paraphrased_prompts(rows, prompts)
    assert len(reworded) == len(rows) == len({row["original"] for row in reworded}) == 24
    assert {row["category"] for row in reworded} == {prompt["category"] for prompt in prompts}
    for row in reworded:
        same = next(prompt for prompt in prompts if prompt["instruction"] == row["original"])
        assert (row["expect"], row["code"]) == (same["expect"], same["code"])
        assert row["instruction"].partition("```")[2] == same["instruction"].partition("```")[2], "the code is the same"
        assert row["instruction"].partition("```")[0] != same["instruction"].partition("```")[0]


def test_paraphrases_of_prompts_that_are_not_asked_are_left_out() -> None:
    rows = [{"original": "¿3?", "instruction": "¿tres?"}, {"original": "¿99?", "instruction": "¿otra?"}]
    assert generalization.paraphrased_prompts(rows, PROMPTS) == [
        {"instruction": "¿tres?", "category": "definicion", "original": "¿3?"}
    ]


# Copying and drift


def test_copying_names_the_row_trained_on() -> None:
    training = [{"response": "Una tupla es un array de longitud fija.", "line": 17}]
    copies = generalization.copied_passages(
        [{"text": "Una tupla es un array de longitud variable."}, {"error": "x"}], training
    )
    assert copies == [{"run": 7, "share": 0.7778, "line": 17, "text": "Una tupla es un array de longitud"}, None]
    assert generalization.copied_summary(copies) == {"n": 1, "median": 7, "longest": 7, "half_copied": 1}
    assert generalization.copied_summary([None]) == {"n": 0, "median": None, "longest": None, "half_copied": 0}


TEXTS = [{"text": "a b", "language": "es" if number < 6 else "en"} for number in range(12)]


def test_drift_is_by_text_and_by_language_and_more_is_worse() -> None:
    base = [2.0 + number / 10 for number in range(12)]
    found = generalization.drift({"base": base, "tutor": [loss + 0.5 for loss in base]}, TEXTS, 7)
    assert (found["conclusion"], found["n"], found["difference"]) == ("worse", 12, 0.5)
    assert found["perplexity"]["tutor"] / found["perplexity"]["base"] == pytest.approx(math.exp(0.5), rel=1e-3)
    assert {name: entry["n"] for name, entry in found["languages"].items()} == {"en": 6, "es": 6}
    assert found["languages"]["es"]["perplexity"]["base"] < found["languages"]["en"]["perplexity"]["base"]
    assert generalization.drift({"base": base, "tutor": base}, TEXTS, 7)["conclusion"] == "no difference shown"
    json.dumps(generalization.drift({"base": [9e9] * 12, "tutor": base}, TEXTS, 7), allow_nan=False)


# Findings


def sentences(results: dict[str, Any]) -> list[str]:
    return [finding["text"] for finding in generalization.findings(results)]


def test_what_got_worse_comes_first_and_in_words() -> None:
    before = [record(passed=False) for _ in range(20)]
    after = [record(spanish=False) for _ in range(20)]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, before, after, 7)}
    general = generalization.drift({"base": [2.0] * 12, "tutor": [2.5] * 12}, TEXTS, 7)
    reworded = change(after, before, "passed", 7)
    copied = {"tutor": {"n": 20, "half_copied": 3}, "held-out rows": {"n": 5, "half_copied": 0}}
    results = {"differences": [changed], "general": general, "paraphrases": reworded, "copied": copied}
    assert sentences(results) == [
        "base to tutor, in Spanish: 100 % (20/20), then 0 % (0/20) (-100 points, -100 to -70): worse",
        "the same questions in other words: 100 % (20/20), then 0 % (0/20) (-100 points, -100 to -70): worse",
        "general texts: perplexity 7.39 before and 12.18 after tuning (12 texts): worse",
        "tutor: 3 of 20 answers are copied by half or more",
        "base to tutor, all that was asked: 0 % (0/20), then 100 % (20/20) (+100 points, +70 to +100): better",
    ]


def test_only_a_tuned_model_is_told_off_for_copying() -> None:
    copies = {"n": 20, "half_copied": 3}
    untuned = dict.fromkeys(("base", "base-F16", "hf:base", "held-out rows"), copies)
    assert sentences({"copied": untuned}) == []
    tuned = {**untuned, "tutor": copies, "hf:tutor": copies, "tutor-Q8_0": copies, "ollama:base": copies}
    assert [text.partition(": 3")[0] for text in sentences({"copied": tuned})] == list(tuned)[4:]


def test_a_kind_is_named_where_the_verdict_over_all_does_not_say_the_same() -> None:
    kinds = [prompt["category"] for prompt in PROMPTS]
    before = [record(spanish=kind == "definicion") for kind in kinds]
    after = [record(spanish=kind != "definicion") for kind in kinds]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, before, after, 7)}
    assert sentences({"differences": [changed]})[0] == (
        "base to tutor, in Spanish, definicion: 100 % (10/10), then 0 % (0/10) (-100 points, -100 to -50): worse"
    )


def test_where_nothing_is_shown_only_the_verdict_over_all_is_said() -> None:
    same = [record() for _ in range(20)]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, same, same, 7)}
    assert sentences({"differences": [changed], "general": None, "paraphrases": None, "copied": {}}) == [
        "base to tutor, all that was asked: 100 % (20/20), then 100 % (20/20) (+0 points, -10 to +10): "
        "no difference shown"
    ]
