"""pipeline/staleness.py: edited rows, settings and earlier stages are named; code and versions are not counted."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import run_one
from tutor.pipeline.staleness import edited_inputs, with_needs
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe

SERVED = ("modelfile", "parity")


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    """A build folder where the data stage has run, and train on its rows."""
    build = tmp_path / "build"
    assert run_one("data", recipe, build)
    write_training(recipe, build)
    return build


def write_training(recipe: Recipe, build: Path) -> None:
    data = require_stage(build / "small/data", "data").fingerprint
    with writing(build / "small/adapter", "train", {**BY_NAME["train"].recipe_fields(recipe), "input.data": data}) as (
        out,
        _,
    ):
        (out / "adapter").write_text("x")


def edited(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changed)


def test_unchanged_inputs_have_no_line(recipe: Recipe, build: Path) -> None:
    assert edited_inputs(recipe, build, SERVED) == []
    assert edited_inputs(edited(recipe, generate={"temperature": 1.0}), build, SERVED) == []


def test_edited_rows_are_named(recipe: Recipe, build: Path) -> None:
    rows = recipe.resolve(recipe.data.train)
    rows.write_text(rows.read_text("utf-8") + "\n", "utf-8")
    assert edited_inputs(recipe, build, SERVED) == ["data was made of another file.train"]


def test_edited_settings_are_named_by_their_stage(recipe: Recipe, build: Path) -> None:
    found = edited_inputs(edited(recipe, data={"held_out": 0.3}, train={"rank": 4}), build, SERVED)
    assert found == ["data was made of another recipe.held_out", "train was made of another recipe.rank"]


def test_stage_of_an_older_input_is_named(recipe: Recipe, build: Path) -> None:
    changed = edited(recipe, data={"held_out": 0.3})
    assert run_one("data", changed, build)
    assert edited_inputs(changed, build, SERVED) == ["train was made of another input.data"]


def test_stage_that_the_model_does_not_need_has_no_line(recipe: Recipe, build: Path) -> None:
    with writing(build / "small/eval", "evaluate", {"recipe.seed": 99}) as (out, _):
        (out / "answers.json").write_text("[]")
    assert edited_inputs(recipe, build, SERVED) == []
    assert "evaluate" not in with_needs("parity") | with_needs("modelfile")


def test_rows_that_are_not_here_are_said_to_be_unknown(
    recipe: Recipe, build: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe.resolve(recipe.data.train).unlink()
    with caplog.at_level(logging.INFO):
        assert edited_inputs(recipe, build, SERVED) == []
    assert "the inputs of data cannot be compared" in caplog.text


def test_other_code_and_versions_are_not_counted(recipe: Recipe, build: Path) -> None:
    path = build / "small/data/manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["fields"] |= {"code": "0" * 16, "version.pydantic": "0"}
    path.write_text(json.dumps(manifest), "utf-8")
    assert edited_inputs(recipe, build, SERVED) == []


def test_setting_that_json_writes_as_another_type_is_equal(
    recipe: Recipe, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = BY_NAME["train"].recipe_fields(recipe)
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    assert changed != fields
    monkeypatch.setattr(
        type(BY_NAME["train"]), "recipe_fields", lambda stage, _: changed if stage.name == "train" else {}
    )
    assert edited_inputs(recipe, build, SERVED) == []
