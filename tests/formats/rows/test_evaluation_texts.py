"""formats/rows/evaluation_texts.py: the two files of [evaluate]."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows
from support.processes.command import ROOT

from tutor.errors import DataError, RecipeError
from tutor.formats.rows.evaluation_texts import GENERAL_KEYS, check_files, read_texts
from tutor.graders.copied_text import longest_copies
from tutor.graders.intervals import MIN_PAIRS
from tutor.recipe.settings import Recipe
from tutor.stages.evaluate.generalization import read_paraphrases


def named(folder: Path, **files: str) -> Recipe:
    return Recipe.model_validate({"evaluate": files}).model_copy(update={"path": folder / "r.toml"})


def test_missing_file_raises_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.jsonl"):
        check_files(named(tmp_path, general="none.jsonl"))


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
        check_files(named(tmp_path, **{name: "rows.jsonl"}))
    assert caught.value.problems[0].startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert why in caught.value.problems[0]


def test_files_of_the_project_are_valid() -> None:
    recipe = named(ROOT / "data", paraphrases="paraphrases.jsonl", general="general.jsonl")
    check_files(recipe)
    prompts = [json.loads(line) for line in (ROOT / "data" / "eval.jsonl").read_text("utf-8").splitlines()]
    paraphrased = read_paraphrases(recipe, prompts)
    assert len(paraphrased) == len({row["original"] for row in paraphrased}) == 24
    assert {row["category"] for row in paraphrased} == {prompt["category"] for prompt in prompts}
    for row in paraphrased:
        same = next(prompt for prompt in prompts if prompt["instruction"] == row["original"])
        assert (row["expect"], row["code"]) == (same["expect"], same["code"])
        assert row["instruction"].partition("```")[2] == same["instruction"].partition("```")[2], "the code is the same"
        assert row["instruction"].partition("```")[0] != same["instruction"].partition("```")[0]


def test_general_texts_are_many_of_many_kinds_and_languages() -> None:
    """Enough texts of each kind and language for an interval, and no passage in two of them."""
    rows = read_texts(ROOT / "data" / "general.jsonl", GENERAL_KEYS)
    assert len(rows) >= 100
    for key, least in (("kind", 10), ("language", 8)):
        counts = Counter(row[key] for row in rows)
        assert len(counts) >= least
        assert min(counts.values()) >= MIN_PAIRS
    assert all(20 <= len(row["text"].split()) <= 70 for row in rows)
    texts = [row["text"] for row in rows]
    copies = [longest_copies([text], texts[:at])[0] for at, text in enumerate(texts)]
    assert [copy.text for copy in copies if copy.run] == []
