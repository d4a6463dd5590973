"""cli/output_file.py: a file that the user names never replaces an input, and is written whole."""

import os
from pathlib import Path

import pytest

from tutor.cli.output_file import check_output, write_output
from tutor.errors import RecipeError


def test_output_that_is_an_input_is_refused_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}", "utf-8")
    (tmp_path / "link").symlink_to(rows)
    (tmp_path / "folder").symlink_to(tmp_path)
    os.link(rows, tmp_path / "same")
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "./rows.jsonl", "link", "same", "folder/rows.jsonl", str(rows)):
        with pytest.raises(RecipeError, match="an input: it would be lost") as caught:
            check_output(Path(name), [tmp_path / "none", rows])
        assert caught.value.code == 2
    for name in ("page.html", "none", "folder/page.html"):
        check_output(Path(name), [tmp_path / "none", rows])


def test_output_is_whole_or_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    (tmp_path / "link").symlink_to(page)
    write_output(tmp_path / "link", "á")
    assert (page.read_text("utf-8"), (tmp_path / "link").is_symlink()) == ("á", True)
    (tmp_path / "new").touch()
    assert page.stat().st_mode == (tmp_path / "new").stat().st_mode
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RecipeError, match="cannot be written: No space left"):
            write_output(page, "b")
    assert page.read_text("utf-8") == "á"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new", "page.html"]


def test_output_may_be_a_device(tmp_path: Path) -> None:
    write_output(Path("/dev/null"), "a")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(RecipeError, match="cannot be written"):
        write_output(tmp_path / "none" / "page.html", "a")


def test_output_never_replaces_what_is_no_page(tmp_path: Path) -> None:
    for name, text in (("rows.jsonl", "{}"), ("recipe.toml", "seed = 1"), ("short", "<")):
        (tmp_path / name).write_text(text, "utf-8")
        with pytest.raises(RecipeError, match="is no HTML page: it would be lost") as caught:
            check_output(tmp_path / name, [])
        assert caught.value.code == 2
    for name, text in (("page.html", "<!DOCTYPE html>\n<html>"), ("empty.html", "")):
        (tmp_path / name).write_text(text, "utf-8")
        check_output(tmp_path / name, [])
