"""cli/commands/data.py: data lint."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.files import write_rows
from support.html_pages import Page
from support.models.small_tokenizer import write_base, write_byte_tokenizer
from support.outputs.lint_rows import GOOD

from tutor.cli.commands.data import lint_command
from tutor.errors import DataError, RecipeError


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(lint_command, [str(argument) for argument in arguments])


def test_findings_are_printed_and_fail_only_if_strict(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*GOOD, GOOD[0]])
    done = command(tmp_path / "rows.jsonl")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == f"{tmp_path / 'rows.jsonl'}:{len(GOOD) + 1}: duplicate: repeats line 1"
    assert done.stdout.splitlines()[-1] == "  findings: 1 duplicate"
    strict = command(tmp_path / "rows.jsonl", "--strict")
    assert (strict.exit_code, strict.stdout) == (DataError.code, done.stdout)
    assert strict.stderr.startswith("Error: 1 findings")


def test_json_output_is_one_document_if_strict(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*GOOD, GOOD[0]])
    done = command(tmp_path / "rows.jsonl", "--strict", "--json")
    assert json.loads(done.stdout)["counts"] == {"duplicate": 1}
    assert done.exit_code == DataError.code


def test_default_files_are_those_of_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    done = command("-r", recipe_file, "-b", tmp_path / "build", "--html", tmp_path / "page.html", "--json")
    report = json.loads(done.stdout)
    assert list(report["files"]) == [str(tmp_path / "tutor.jsonl"), str(tmp_path / "eval.jsonl")]
    assert report["figures"]["nearest"]["prompts"] == 3
    assert report["figures"]["lengths"]["unit"] == "characters"
    page = (tmp_path / "page.html").read_text("utf-8")
    assert Page(page).open == []
    command("-r", recipe_file, "-b", tmp_path / "build", "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == page  # its own page may be replaced


def test_lengths_are_in_tokens_after_the_base_stage(recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_base(tmp_path / "build" / "small" / "base", write_byte_tokenizer(tmp_path / "tokenizer.json"))
    done = command("-r", recipe_file, "-b", tmp_path / "build", "--json")
    assert json.loads(done.stdout)["figures"]["lengths"]["unit"] == "tokens"


def test_unwritable_page_is_a_recipe_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", GOOD)
    done = command(tmp_path / "rows.jsonl", "--html", tmp_path / "none" / "page.html")
    assert isinstance(done.exception, RecipeError)


def test_page_never_replaces_a_file_that_is_read(recipe_file: Path, tmp_path: Path) -> None:
    given = ("-r", recipe_file, "-b", tmp_path / "build")
    other = tmp_path / "mine.jsonl"
    write_rows(other, GOOD)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, page in (
        ((other,), other),
        ((other,), tmp_path / "." / "mine.jsonl"),
        ((other, "--against", tmp_path / "eval.jsonl"), tmp_path / "eval.jsonl"),
        ((other,), tmp_path / "eval.jsonl"),
        ((), tmp_path / "tutor.jsonl"),
        ((), recipe_file),
    ):
        done = command(*arguments, *given, "--html", page)
        assert isinstance(done.exception, RecipeError)
        assert done.exception.code == 2
        assert done.stdout == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
