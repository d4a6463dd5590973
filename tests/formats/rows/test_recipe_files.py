"""formats/rows/recipe_files.py: the files that a recipe names, and names that are none."""

from pathlib import Path

import pytest
from support.files import write_rows

from tutor.errors import DataError, RecipeError
from tutor.formats.rows.recipe_files import EVALUATION_LIMITS, data_files, evaluation_files
from tutor.recipe.settings import Recipe


def recipe_in(folder: Path, **tables: dict[str, str]) -> Recipe:
    for name in ("tutor.jsonl", "eval.jsonl"):
        write_rows(folder / name, [{"instruction": "x"}])
    return Recipe.model_validate(tables).model_copy(update={"path": folder / "r.toml"})


def test_data_files_are_those_of_the_recipe(tmp_path: Path) -> None:
    assert data_files(recipe_in(tmp_path)) == {"train": tmp_path / "tutor.jsonl"}
    both = recipe_in(tmp_path, data={"eval": "eval.jsonl"})
    assert data_files(both) == {"train": tmp_path / "tutor.jsonl", "eval": tmp_path / "eval.jsonl"}


@pytest.mark.parametrize("name", ["absent.jsonl", "loop", "~nobody-of-that-name/rows.jsonl", "a\0b"])
@pytest.mark.parametrize("key", ["train", "eval"])
def test_data_files_with_an_unusable_name_raises(tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RecipeError):
        data_files(recipe_in(tmp_path, data={key: name}))


def test_evaluation_files_are_those_that_the_recipe_names(tmp_path: Path) -> None:
    assert evaluation_files(recipe_in(tmp_path)) == {}
    assert evaluation_files(recipe_in(tmp_path, evaluate={"general": "eval.jsonl"})) == {
        "general": tmp_path / "eval.jsonl"
    }


def test_evaluation_files_that_are_too_large_raises(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, evaluate={"paraphrases": "large.jsonl"})
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.truncate(EVALUATION_LIMITS.max_total_bytes + 1)
    with pytest.raises(DataError, match="at most"):
        evaluation_files(recipe)
