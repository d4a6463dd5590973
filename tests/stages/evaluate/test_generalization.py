"""stages/evaluate/generalization.py: paraphrases, copied text, findings."""

from typing import Any

from support.outputs.records import PROMPTS, record

from tutor.stages.evaluate import generalization
from tutor.stages.evaluate.rates import change, changes


def test_paraphrases_of_other_prompts_are_left_out() -> None:
    rows = [{"original": "¿3?", "instruction": "¿tres?"}, {"original": "¿99?", "instruction": "¿otra?"}]
    assert generalization.paraphrased_prompts(rows, PROMPTS) == [
        {"instruction": "¿tres?", "category": "definicion", "original": "¿3?"}
    ]


def test_copied_passage_names_the_training_row() -> None:
    training = [{"response": "Una tupla es un array de longitud fija.", "line": 17}]
    copies = generalization.copied_passages(
        [{"text": "Una tupla es un array de longitud variable."}, {"error": "x"}], training
    )
    assert copies == [{"run": 7, "share": 0.7778, "line": 17, "text": "Una tupla es un array de longitud"}, None]
    assert generalization.copied_summary(copies) == {"n": 1, "median": 7, "longest": 7, "half_copied": 1}
    assert generalization.copied_summary([None]) == {"n": 0, "median": None, "longest": None, "half_copied": 0}


def sentences(results: dict[str, Any]) -> list[str]:
    return [finding["text"] for finding in generalization.findings(results)]


def test_findings_list_what_got_worse_first() -> None:
    before = [record(passed=False) for _ in range(20)]
    after = [record(in_language=False) for _ in range(20)]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, before, after, 7)}
    paraphrased = change(after, before, "passed", 7)
    copied = {"tutor": {"n": 20, "half_copied": 3}, "held-out rows": {"n": 5, "half_copied": 0}}
    results = {"differences": [changed], "paraphrases": paraphrased, "copied": copied}
    results["language"] = "es"
    assert sentences(results) == [
        "base to tutor, in Spanish: 100 % (20/20), then 0 % (0/20) (-100 points, -100 to -70): worse",
        "paraphrased questions: 100 % (20/20), then 0 % (0/20) (-100 points, -100 to -70): worse",
        "tutor: 3 of 20 answers are copied by half or more",
        "base to tutor, all that was asked: 0 % (0/20), then 100 % (20/20) (+100 points, +70 to +100): better",
    ]


def test_findings_on_copying_are_only_about_tuned_models() -> None:
    copies = {"n": 20, "half_copied": 3}
    untuned = dict.fromkeys(("base", "base-F16", "hf:base", "held-out rows"), copies)
    assert sentences({"copied": untuned}) == []
    tuned = {**untuned, "tutor": copies, "hf:tutor": copies, "tutor-Q8_0": copies, "ollama:base": copies}
    assert [text.partition(": 3")[0] for text in sentences({"copied": tuned})] == list(tuned)[4:]


def test_findings_name_a_kind_that_differs_from_the_total() -> None:
    kinds = [prompt["category"] for prompt in PROMPTS]
    before = [record(in_language=kind == "definicion") for kind in kinds]
    after = [record(in_language=kind != "definicion") for kind in kinds]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, before, after, 7)}
    assert sentences({"differences": [changed], "language": "de"})[0] == (
        "base to tutor, in German, definicion: 100 % (10/10), then 0 % (0/10) (-100 points, -100 to -50): worse"
    )


def test_findings_without_difference_are_one_sentence() -> None:
    same = [record() for _ in range(20)]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, same, same, 7)}
    assert sentences({"differences": [changed], "paraphrases": None, "copied": {}}) == [
        "base to tutor, all that was asked: 100 % (20/20), then 100 % (20/20) (+0 points, -10 to +10): "
        "no difference shown"
    ]
