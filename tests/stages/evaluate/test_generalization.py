"""stages/evaluate/generalization.py: the two files of [evaluate], copied text, drift, findings."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows
from support.outputs.records import PROMPTS, record
from support.processes.command import ROOT

from tutor.errors import DataError, RecipeError
from tutor.graders.copied_text import longest_copies
from tutor.graders.intervals import MIN_PAIRS
from tutor.recipe.settings import Recipe
from tutor.stages.evaluate import generalization
from tutor.stages.evaluate.rates import change, changes


def named(folder: Path, **files: str) -> Recipe:
    return Recipe.model_validate({"evaluate": files}).model_copy(update={"path": folder / "r.toml"})


def test_missing_file_raises_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.jsonl"):
        generalization.check_files(named(tmp_path, general="none.jsonl"))


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("general", {"text": "dos palabras"}, "is not an object with only text and language"),
        ("general", {"text": "una", "language": "es"}, "text is a single word"),
        ("general", {"text": "dos palabras", "language": " "}, "language is no text"),
        ("general", {"text": 3, "language": "es"}, "text is no text"),
        ("general", {"text": "dos palabras", "language": "es", "kind": ""}, "kind is no text"),
        ("general", ["a"], "is not an object"),
        ("paraphrases", {"original": "¿A?", "instruction": "¿B?", "code": []}, "with only"),
        ("paraphrases", {"original": "¿A?", "instruction": "a\nRespuesta: b"}, "begins with 'Respuesta:'"),
        ("paraphrases", {"original": "¿A?", "instruction": "<think>"}, "holds <think>"),
    ],
)
def test_invalid_row_raises_data_error_with_its_line(tmp_path: Path, name: str, row: Any, why: str) -> None:
    good = {"text": "dos palabras", "language": "es"} if name == "general" else {"original": "¿?", "instruction": "¿!?"}
    write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        generalization.check_files(named(tmp_path, **{name: "rows.jsonl"}))
    assert caught.value.problems[0].startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert why in caught.value.problems[0]


def test_files_of_the_project_are_valid() -> None:
    recipe = named(ROOT / "data", paraphrases="paraphrases.jsonl", general="general.jsonl")
    generalization.check_files(recipe)
    prompts = [json.loads(line) for line in (ROOT / "data" / "eval.jsonl").read_text("utf-8").splitlines()]
    rows = generalization.read_texts(ROOT / "data" / "paraphrases.jsonl", generalization.PARAPHRASE_KEYS)
    paraphrased = generalization.paraphrased_prompts(rows, prompts)
    assert len(paraphrased) == len(rows) == len({row["original"] for row in paraphrased}) == 24
    assert {row["category"] for row in paraphrased} == {prompt["category"] for prompt in prompts}
    for row in paraphrased:
        same = next(prompt for prompt in prompts if prompt["instruction"] == row["original"])
        assert (row["expect"], row["code"]) == (same["expect"], same["code"])
        assert row["instruction"].partition("```")[2] == same["instruction"].partition("```")[2], "the code is the same"
        assert row["instruction"].partition("```")[0] != same["instruction"].partition("```")[0]


def test_general_texts_are_many_of_many_kinds_and_languages() -> None:
    """Enough texts of each kind and language for an interval, and no passage in two of them."""
    rows = generalization.read_texts(ROOT / "data" / "general.jsonl", generalization.GENERAL_KEYS)
    assert len(rows) >= 100
    for key, least in (("kind", 10), ("language", 8)):
        counts = Counter(row[key] for row in rows)
        assert len(counts) >= least
        assert min(counts.values()) >= MIN_PAIRS
    assert all(20 <= len(row["text"].split()) <= 70 for row in rows)
    texts = [row["text"] for row in rows]
    copies = [longest_copies([text], texts[:at])[0] for at, text in enumerate(texts)]
    assert [copy.text for copy in copies if copy.run] == []


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


TEXTS = [
    {"text": "a b", "language": "es" if number < 6 else "en", "kind": "poem" if number < 8 else "code"}
    for number in range(12)
]


def test_drift_is_by_text_and_language_and_more_is_worse() -> None:
    base = [2.0 + number / 10 for number in range(12)]
    found = generalization.drift({"base": base, "tutor": [loss + 0.5 for loss in base]}, TEXTS, 7)
    assert (found["conclusion"], found["n"], found["difference"]) == ("worse", 12, 0.5)
    assert found["perplexity"]["tutor"] / found["perplexity"]["base"] == pytest.approx(math.exp(0.5), rel=1e-3)
    assert {name: entry["n"] for name, entry in found["languages"].items()} == {"en": 6, "es": 6}
    assert found["languages"]["es"]["perplexity"]["base"] < found["languages"]["en"]["perplexity"]["base"]
    assert {name: entry["n"] for name, entry in found["kinds"].items()} == {"code": 4, "poem": 8}
    assert (found["kinds"]["poem"]["conclusion"], found["kinds"]["poem"]["low"]) == ("worse", 0.5)
    assert (found["kinds"]["code"]["conclusion"], found["kinds"]["code"]["low"]) == ("no difference shown", None)
    plain = [{"text": "a b", "language": "es"}] * 12
    assert generalization.drift({"base": base, "tutor": base}, plain, 7)["kinds"] == {}
    assert generalization.drift({"base": base, "tutor": base}, TEXTS, 7)["conclusion"] == "no difference shown"
    json.dumps(generalization.drift({"base": [9e9] * 12, "tutor": base}, TEXTS, 7), allow_nan=False)


def sentences(results: dict[str, Any]) -> list[str]:
    return [finding["text"] for finding in generalization.findings(results)]


def test_findings_list_what_got_worse_first() -> None:
    before = [record(passed=False) for _ in range(20)]
    after = [record(in_language=False) for _ in range(20)]
    changed = {"before": "base", "after": "tutor", **changes(PROMPTS, before, after, 7)}
    general = generalization.drift({"base": [2.0] * 12, "tutor": [2.5] * 12}, TEXTS, 7)
    paraphrased = change(after, before, "passed", 7)
    copied = {"tutor": {"n": 20, "half_copied": 3}, "held-out rows": {"n": 5, "half_copied": 0}}
    results = {"differences": [changed], "general": general, "paraphrases": paraphrased, "copied": copied}
    results["language"] = "es"
    assert sentences(results) == [
        "base to tutor, in Spanish: 100 % (20/20), then 0 % (0/20) (-100 points, -100 to -70): worse",
        "paraphrased questions: 100 % (20/20), then 0 % (0/20) (-100 points, -100 to -70): worse",
        "general texts: perplexity 7.39 before and 12.18 after tuning (12 texts): worse",
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
    assert sentences({"differences": [changed], "general": None, "paraphrases": None, "copied": {}}) == [
        "base to tutor, all that was asked: 100 % (20/20), then 100 % (20/20) (+0 points, -10 to +10): "
        "no difference shown"
    ]
