"""A recipe's build folder belongs to one recipe file, holds no input, and is as private as the rows."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tutor.errors import RecipeError
from tutor.pipeline.cleaning import clean
from tutor.pipeline.recipe_folder import IN_STACK, held, refuse_folder
from tutor.pipeline.runner import inspect, run_all
from tutor.recipe.reading import read_recipe


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return tmp_path / "build"


def copy_of(recipe_file: Path, folder: Path) -> Path:
    """A recipe of the same name, with its rows, in another folder."""
    folder.mkdir(parents=True)
    for path in recipe_file.parent.glob("*.jsonl"):
        shutil.copy(path, folder)
    return Path(shutil.copy(recipe_file, folder))


def use(recipe_file: Path, build: Path) -> None:
    with held(read_recipe(recipe_file), build):
        pass


# Its recipe


def test_second_recipe_of_a_name_is_refused_by_both_paths(recipe_file, build, tmp_path):
    use(recipe_file, build)
    other = copy_of(recipe_file, tmp_path / "otra receta")
    for ask in (lambda: use(other, build), lambda: inspect(read_recipe(other), build)):
        with pytest.raises(RecipeError) as caught:
            ask()
        assert f"{build}/small belongs to {recipe_file}, and {other} has its name" in caught.value.message
        assert caught.value.hint == f"rename one, or delete its outputs: tutor clean --recipe {recipe_file}"
    with pytest.raises(RecipeError, match="belongs to"):
        clean(read_recipe(other), build, ())


def test_recipe_takes_the_folder_that_was_cleaned(recipe_file, build, tmp_path):
    use(recipe_file, build)
    (build / "small" / "eval-notes.txt").touch()
    clean(read_recipe(recipe_file), build, ())
    other = copy_of(recipe_file, tmp_path / "other")
    use(other, build)
    with pytest.raises(RecipeError, match="belongs to"):
        use(recipe_file, build)


def test_recipe_keeps_its_folder_when_edited_or_moved(recipe_file, build, tmp_path):
    use(recipe_file, build)
    recipe_file.write_text("seed = 7\n" + recipe_file.read_text())
    use(recipe_file, build)
    moved = copy_of(recipe_file, tmp_path / "moved")
    recipe_file.unlink()
    use(moved, build)
    with pytest.raises(RecipeError, match=f"belongs to {moved}"):
        use(copy_of(moved, tmp_path / "third"), build)


def test_recipe_keeps_its_folder_when_the_project_moves(recipe_file, tmp_path):
    """Also when it is copied: the copy's folder belongs to the copy's recipe."""
    project = tmp_path / "project"
    recipe = copy_of(recipe_file, project / "data")
    use(recipe, project / "build")
    shutil.copytree(project, tmp_path / "copy")
    use(tmp_path / "copy" / "data" / "small.toml", tmp_path / "copy" / "build")
    project.rename(tmp_path / "moved")
    use(tmp_path / "moved" / "data" / "small.toml", tmp_path / "moved" / "build")


def test_folder_that_was_moved_alone_is_any_recipes(recipe_file, build, tmp_path):
    """Its record leads beyond the root from a place less deep, and there the system stays at the root."""
    deep = tmp_path / "a" / "b" / "c"
    use(recipe_file, deep)
    (deep / "small" / ".recipe.json").write_text(json.dumps({"recipe": "../" * 99 + str(recipe_file).lstrip("/")}))
    deep.rename(build)
    use(copy_of(recipe_file, tmp_path / "other"), build)


def test_recipe_by_another_path_is_the_same(recipe_file, build, tmp_path, monkeypatch):
    use(recipe_file, build)
    (tmp_path / "link").symlink_to(recipe_file.parent)
    use(tmp_path / "link" / "small.toml", build)
    monkeypatch.chdir(tmp_path)
    use(Path("small.toml"), Path("build"))


def test_recipe_that_differs_in_case_alone_is_refused(recipe_file, build, tmp_path):
    """On a disk that ignores case Small.toml has the folder of small.toml; a link stands for it."""
    use(recipe_file, build)
    (build / "Small").symlink_to("small")
    other = copy_of(recipe_file, tmp_path / "other").rename(tmp_path / "other" / "Small.toml")
    with pytest.raises(RecipeError, match=f"belongs to {recipe_file}"):
        use(other, build)


def test_container_accepts_the_recipe_by_its_path_there(recipe_file, build, tmp_path, monkeypatch):
    """A service sees /work/data/small.toml; the host's record stays."""
    use(recipe_file, build)
    record = (build / "small" / ".recipe.json").read_bytes()
    mounted = copy_of(recipe_file, tmp_path / "work" / "data")
    monkeypatch.setenv(IN_STACK, "1")
    use(mounted, build)
    assert (build / "small" / ".recipe.json").read_bytes() == record


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": 1}', '{"recipe": "\\u0000"}', '{"recipe": "a/../../x"}'])
def test_damaged_record_is_written_again(recipe_file, build, tmp_path, text):
    use(recipe_file, build)
    (build / "small" / ".recipe.json").write_text(text)
    use(recipe_file, build)
    with pytest.raises(RecipeError, match="belongs to"):
        use(copy_of(recipe_file, tmp_path / "other"), build)


# Its inputs


@pytest.mark.parametrize("setting", ["data.train", "data.eval", "evaluate.paraphrases", "evaluate.general"])
@pytest.mark.parametrize("linked", [False, True])
def test_rows_in_the_build_folder_are_refused(recipe_file, build, setting, linked):
    rows = build / "small" / "data" / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    shutil.copy(recipe_file.with_name("tutor.jsonl"), rows)
    if linked:
        recipe_file.with_name("link.jsonl").symlink_to(rows)
    section, name = setting.split(".")
    path = "link.jsonl" if linked else str(rows)
    recipe_file.write_text(f'base = {{source = "tiny"}}\n{section} = {{{name} = "{path}"}}\n')
    before = sorted(build.rglob("*"))
    with pytest.raises(RecipeError, match=f"{setting} of .*small.toml is in the build folder .*small: {rows}"):
        run_all(read_recipe(recipe_file), build)
    assert sorted(build.rglob("*")) == before


@pytest.mark.parametrize("place", ["build/small/base/model", "build/small", "build", ".", "/", "links"])
def test_base_and_build_folder_inside_each_other_are_refused(recipe_file, build, tmp_path, place):
    made = build / "small" / "base" / "model"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "config.json").symlink_to(made / "config.json")
    recipe_file.write_text(recipe_file.read_text().replace('"tiny"', f'"path:{place}"'))
    with pytest.raises(RecipeError, match=r"base\.source of "):
        run_all(read_recipe(recipe_file), build)
    assert not (build / "small" / ".lock").exists()


def test_recipe_in_its_own_build_folder_is_refused(recipe_file, build):
    (build / "small").mkdir(parents=True)
    inside = recipe_file.rename(build / "small" / "small.toml")
    with pytest.raises(RecipeError, match=r"the file of .* is in the build folder"):
        refuse_folder(read_recipe(inside), build)


def test_base_of_another_recipes_build_is_accepted(recipe_file, build):
    (build / "other" / "base" / "model").mkdir(parents=True)
    recipe_file.write_text(recipe_file.read_text().replace('"tiny"', '"path:build/other/base/model"'))
    refuse_folder(read_recipe(recipe_file), build)


# Its permissions


@pytest.mark.parametrize(("mode", "expected"), [(0o600, 0o700), (0o640, 0o750), (0o644, 0o755)])
def test_folder_is_closed_to_users_who_cannot_read_rows(recipe_file, build, mode, expected):
    recipe_file.with_name("tutor.jsonl").chmod(mode)
    before = os.umask(0o022)
    try:
        use(recipe_file, build)
        (build / "small").chmod(0o755)  # made before the rows were private
        use(recipe_file, build)
    finally:
        os.umask(before)
    assert oct((build / "small").stat().st_mode & 0o777) == oct(expected)
