"""`tutor clean` removes what stages made, and leaves what it does not recognise."""

import json
from pathlib import Path

import pytest
from support.outputs.stage_folders import write_stage

from tutor.errors import RecipeError
from tutor.pipeline.cleaning import clean
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> Path:
    """The recipe's folder, with a data stage."""
    write_stage(tmp_path / "build" / "small" / "data")
    return tmp_path / "build" / "small"


def test_clean_removes_a_stage_and_what_a_kill_leaves(recipe, folder):
    for name in ("data.partial", "data.replaced", "data.log", "base.partial"):
        (folder / name).mkdir()
    (folder / "ladder.log").write_text("server")
    gone = [folder / name for name in ("data", "data.partial", "data.replaced", "data.log")]
    assert clean(recipe, folder.parent, ("data",)).removed == gone
    assert clean(recipe, folder.parent, ()).removed == [folder / "base.partial", folder / "ladder.log"]
    assert clean(recipe, folder.parent, ()).removed == []


def test_clean_removes_folders_that_commands_derived(recipe, folder):
    for name in ("lora", "eval-ollama"):
        write_stage(folder / name)
    for name in ("adapter.checkpoints", "lora.partial", "eval-ollama.log"):
        (folder / name).mkdir()
    (folder / "eval-ollama.log" / "1.log").touch()
    assert clean(recipe, folder.parent, ("merge",)).removed == []
    assert sorted(clean(recipe, folder.parent, ("train",)).removed) == [
        folder / "adapter.checkpoints", folder / "lora", folder / "lora.partial"
    ]  # fmt: skip
    rest = ["data", "eval-ollama", "eval-ollama.log"]
    assert clean(recipe, folder.parent, ()).removed == [folder / name for name in rest]


APP = json.dumps({"name": "Mi aplicación", "icons": [], "start_url": "/"})
"""The manifest.json of a web application."""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("eval-app/manifest.json", "its manifest.json is not tutor's"),
        ("report/manifest.json", "its manifest.json is not tutor's"),
        ("gguf/mine.gguf", "it has no manifest.json"),
        ("eval.log/notes.txt", "tutor writes no notes.txt"),
        ("eval-notes.txt", "it is a file"),
        ("data.aside/notes.txt", None),
    ],
)
def test_clean_leaves_what_tutor_did_not_make(recipe, folder, name, reason):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(APP)
    cleaned = clean(recipe, folder.parent, ())
    assert path.read_text() == APP
    assert cleaned.removed == [folder / "data"]
    assert cleaned.left == ({folder / name.partition("/")[0]: reason} if reason else {})


def test_clean_removes_a_link_and_leaves_its_target(recipe, folder, tmp_path):
    write_stage(tmp_path / "elsewhere")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").touch()
    (folder / "gguf").symlink_to(tmp_path / "elsewhere")
    (folder / "gguf.log").symlink_to(tmp_path / "logs")
    (folder / "merged").symlink_to(tmp_path / "not mounted")
    assert clean(recipe, folder.parent, ()).left == {folder / "merged": "it is a link to nothing"}
    assert (tmp_path / "elsewhere" / "top.txt").exists()
    assert (tmp_path / "logs" / "a.log").exists()
    assert {path.name for path in folder.iterdir()} <= {".lock", ".lock.json", ".recipe.json", "merged"}


def test_clean_removes_a_folder_whose_manifest_is_cut(recipe, folder):
    path = folder / "data" / "manifest.json"
    path.write_text(path.read_text()[:40])
    assert clean(recipe, folder.parent, ()).removed == [folder / "data"]


def test_clean_refuses_unknown_stages(recipe, folder):
    with pytest.raises(RecipeError, match="no stage 'dta'; known: data, base"):
        clean(recipe, folder.parent, ("dta",))
