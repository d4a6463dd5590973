"""stages/data/stage.py: the files that the stage writes, its refusals, its statistics."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows

from tutor.errors import DataError, RecipeError
from tutor.formats.rows.examples import Example
from tutor.formats.rows.split_files import HELD_OUT, PROMPTS, TRAIN, read_split
from tutor.recipe.settings import DataSettings, Recipe
from tutor.stages.data import reading, splitting
from tutor.stages.data import stage as data


def test_row_statistics_count_rows_blocks_and_characters() -> None:
    block = "Así:\n\n```TS strict\nlet x = 1;\n```\n\n> ```\n> y\n> ```"
    examples = [
        Example("uno", "12345", "definicion", "tipos"),
        Example("¿Uno?", block, "definicion", "genericos"),
        Example("dos", "1", "ejemplo", "tipos"),
    ]
    found = data.row_statistics(examples)
    assert found["rows"] == 3
    assert (found["questions"], found["repeated_questions"]) == (2, 1)
    assert found["categories"] == {"definicion": 2, "ejemplo": 1}
    assert found["categories_and_topics"] == {"definicion": {"genericos": 1, "tipos": 1}, "ejemplo": {"tipos": 1}}
    assert found["instruction_characters"] == {"min": 3, "median": 3, "p95": 5, "max": 5}
    assert found["response_characters"]["max"] == len(block)
    assert found["fenced_blocks"] == {"": 1, "ts": 1}
    assert found["rows_without_block"] == 2
    assert json.loads(json.dumps(found)) == found
    assert data.row_statistics([])["rows"] == 0


def recipe_in(
    folder: Path, training: list[dict[str, Any]], prompts: list[dict[str, Any]], /, **settings: Any
) -> Recipe:
    write_rows(folder / "tutor.jsonl", training)
    write_rows(folder / "eval.jsonl", prompts)
    return Recipe(data=DataSettings(**{"eval": "eval.jsonl", **settings}), path=folder / "tiny.toml")


TRAINING = [
    {"instruction": f"¿Qué es {n}?", "response": f"«{n}»\u2028\u2029.", "category": "ab"[n % 2]} for n in range(20)
]


def test_stage_writes_rows_that_read_split_returns(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "¿Y esto?", "expect": {"include": [["año"]]}}])
    summary = data.run(recipe, {}, tmp_path / "out")
    assert (summary["rows"], summary["train"], summary["held_out"], summary["prompts"]) == (20, 18, 2, 1)
    examples, _ = reading.read_examples(tmp_path / "tutor.jsonl")
    expected = (*splitting.split(examples, 0.1, recipe.seed), reading.read_prompts(tmp_path / "eval.jsonl")[0])
    for name, rows in zip((TRAIN, HELD_OUT, PROMPTS), expected, strict=True):
        assert read_split(tmp_path / "out", name) == json.loads(json.dumps([asdict(row) for row in rows]))
    text = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert text.startswith('{"instruction": "¿Qué es '.encode())
    assert text.count(b"\n") == 18
    assert b"\r" not in text
    assert json.loads(json.dumps(summary)) == summary


def test_recipe_limits_the_numbers_of_rows_and_prompts(tmp_path: Path) -> None:
    prompts = [{"instruction": f"p{n}", "category": "ab"[n % 2]} for n in range(8)]
    summary = data.run(recipe_in(tmp_path, TRAINING, prompts, rows=10, prompts=4), {}, tmp_path / "out")
    assert (summary["rows"], summary["train"] + summary["held_out"], summary["prompts"]) == (20, 10, 4)
    train, held_out, asked = (read_split(tmp_path / "out", name) for name in (TRAIN, HELD_OUT, PROMPTS))
    assert Counter(each["category"] for each in [*train, *held_out]) == {"a": 5, "b": 5}
    assert Counter(each["category"] for each in asked) == {"a": 2, "b": 2}


def test_equal_rows_in_other_folders_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data.run(recipe_in(tmp_path / name, TRAINING, [{"instruction": "x"}], rows=10), {}, tmp_path / name / "out")
    for path in (tmp_path / "one" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "out" / path.name).read_bytes()


def test_leaked_rows_are_removed_from_training_and_reported(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "z"}, {"instruction": "QUE ES 7"}])
    summary = data.run(recipe, {}, tmp_path / "out")
    assert (summary["rows"], summary["train"] + summary["held_out"]) == (20, 19)
    assert summary["notes"] == ["tutor.jsonl: 1 rows removed, for eval.jsonl asks them too"]
    report = json.loads((tmp_path / "out" / "statistics.json").read_text("utf-8"))
    assert report["removed_from_train"] == [{"line": 8, "eval_line": 2}]
    rows = [row for name in (TRAIN, HELD_OUT) for row in read_split(tmp_path / "out", name)]
    assert "¿Qué es 7?" not in {row["instruction"] for row in rows}


def test_leaks_are_an_error_if_strict_or_if_no_row_is_left(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "que es 7"}])
    with pytest.raises(DataError) as caught:
        data.run(recipe, {}, tmp_path / "out", strict=True)
    assert caught.value.problems == (f"{tmp_path}/tutor.jsonl:8: also {tmp_path}/eval.jsonl:1",)
    with pytest.raises(DataError, match="20 of 20 rows repeat a question"):
        data.run(recipe_in(tmp_path, TRAINING, TRAINING), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["train", "eval"])
def test_missing_file_of_the_recipe_is_a_recipe_error(tmp_path: Path, key: str) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "x"}], **{key: "absent.jsonl"})
    with pytest.raises(RecipeError, match=r"absent\.jsonl"):
        data.run(recipe, {}, tmp_path / "out")


def test_reasoning_that_would_not_be_trained_is_refused(tmp_path: Path) -> None:
    thought = {**TRAINING[3], "reasoning": "Un conjunto."}
    recipe = recipe_in(tmp_path, [*TRAINING[:3], thought, *TRAINING[4:]], [{"instruction": "¿Y esto?"}])
    with pytest.raises(DataError, match="1 of 20 rows have reasoning, and the recipe's reasoning is 'none'") as fault:
        data.run(recipe, {}, tmp_path / "out")
    assert fault.value.problems == (f"{tmp_path / 'tutor.jsonl'}:4: has reasoning",)
    thinking = recipe.model_copy(update={"prompt": "base", "reasoning": "rows"})
    assert data.run(thinking, {}, tmp_path / "out")["rows"] == 20
