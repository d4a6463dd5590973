"""cli/options.py: where settings come from, paths, and the result on stdout."""

import json
import os
import shutil
from pathlib import Path

import click
import pytest
from support.files import write_rows
from support.processes.command import in_process

from tutor.cli.options import Seconds, TextCommand, json_option


def test_flag_wins_over_variable_and_variable_over_default(tutor, recipe_file, tmp_path):
    def folder(*arguments: str | Path, **env: str) -> str:
        (first, *_) = json.loads(tutor("status", "--json", *arguments, env=env, cwd=tmp_path).stdout)
        return str(first["folder"])

    (tmp_path / "data").mkdir()
    other = shutil.copy(recipe_file, tmp_path / "other.toml")
    shutil.copy(recipe_file, tmp_path / "data" / "tutor.toml")
    for rows in tmp_path.glob("*.jsonl"):
        shutil.copy(rows, tmp_path / "data")
    assert folder() == "build/tutor/data"
    variables = {"TUTOR_RECIPE": str(other), "TUTOR_BUILD": "elsewhere"}
    assert folder(**variables) == "elsewhere/other/data"
    assert folder("-r", recipe_file, "-b", "flag", **variables) == "flag/small/data"


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "86401", "soon"])
def test_wait_that_would_never_end_is_a_usage_error(value):
    with pytest.raises(click.BadParameter):
        Seconds().convert(value, None, None)
    assert Seconds().convert("0.5", None, None) == 0.5


@pytest.mark.slow
def test_paths_with_blanks_accents_or_raw_bytes_work(tutor, recipe_file, tmp_path):
    for name in ("con espacios y ñandúes €", os.fsdecode(b"mal\xf1a")):
        place = tmp_path / name
        place.mkdir()
        for file in (recipe_file, *tmp_path.glob("*.jsonl")):
            shutil.copy(file, place)
        assert tutor("data", "split", "-r", place / "small.toml", "-b", place / "build").returncode == 0
        done = tutor("status", "--json", "-r", "small.toml", cwd=place)
        assert json.loads(done.stdout)[0]["condition"] == "up to date"


@pytest.mark.slow
def test_stdout_holds_only_the_result_as_one_json_document(tutor, recipe_file, tmp_path):
    where = ("--json", "-r", recipe_file, "-b", tmp_path / "build")
    split = tutor("data", "split", *where)
    assert json.loads(split.stdout)["results"]["train"] + json.loads(split.stdout)["results"]["held_out"] == 12
    assert "data: done" in split.stderr
    quiet = tutor("-q", "data", "split", *where)
    assert json.loads(quiet.stdout)["ran"] is False
    assert quiet.stderr == ""
    assert json.loads(tutor("data", "check", *where).stdout)[0]["rows"] == 12
    assert json.loads(tutor("data", "stats", *where).stdout)["rows"] == 12
    assert json.loads(tutor("why", "train", *where).stdout)["condition"] == "missing"
    assert json.loads(tutor("run", "--until", "data", *where).stdout)["ran"] == []
    assert json.loads(tutor("clean", *where).stdout)["removed"] == [str(tmp_path / "build" / "small" / "data")]


@click.command(cls=TextCommand)
@click.argument("question", required=False)
@click.option("-m", "--model", default="tutor")
@json_option
def question_command(question: str | None, model: str, *, as_json: bool) -> tuple[str | None, str, bool]:
    return question, model, as_json


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-5 % 3",), ("-5 % 3", "tutor", False)),
        (("-5", "--json"), ("-5", "tutor", True)),
        (("--json", "- ¿qué?"), ("- ¿qué?", "tutor", True)),
        (("-m", "base", "-x + 1"), ("-x + 1", "base", False)),
        (("-mbase", "--x y"), ("--x y", "base", False)),
        (("-m", "-5 x", "hola"), ("hola", "-5 x", False)),
        (("--model=a b", "hola"), ("hola", "a b", False)),
        (("--json", "--", "--json"), ("--json", "tutor", True)),
        (("-",), ("-", "tutor", False)),
        ((), (None, "tutor", False)),
    ],
)
def test_text_that_begins_with_a_dash_is_no_option(arguments, expected):
    assert question_command.main(list(arguments), standalone_mode=False) == expected


@pytest.mark.parametrize("word", ["--jsn", "-x", "--modell=a b"])
def test_unknown_option_beside_a_text_is_refused(word):
    with pytest.raises(click.NoSuchOption):
        question_command.main([word, "hola"], standalone_mode=False)


HOSTILE = "\x1b]0;x\x07\u202e\x9b2J"
ESCAPED = r"\x1b]0;x\x07\u202e\x9b2J"


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "stats", "ROWS"),
        ("data", "check", "ROWS", "--no-code"),
        ("data", "lint", "ROWS"),
        ("data", "split"),
        ("status",),
        ("why", "data"),
        ("why", HOSTILE),
        ("run", "--until", HOSTILE),
        ("clean", HOSTILE),
        ("summary", "-r", f"{HOSTILE}.toml"),
        ("data", "stats", f"{HOSTILE}.jsonl"),
        ("status", f"--{HOSTILE}"),
        (HOSTILE,),
        ("verify", f"./{HOSTILE}.gguf"),
    ],
    ids=lambda arguments: " ".join(arguments).encode("unicode_escape").decode(),
)
@pytest.mark.parametrize("as_json", [False, True], ids=["lines", "json"])
def test_text_of_strangers_reaches_no_terminal_unescaped(recipe_file, tmp_path, arguments, as_json):
    hostile = tmp_path / f"{HOSTILE}.jsonl"
    write_rows(hostile, [{"instruction": "¿?", "response": "Sí.", "category": HOSTILE, "topic": HOSTILE}])
    words = [str(hostile) if word == "ROWS" else word for word in arguments]
    where = () if "-r" in words or words[0] == HOSTILE else ("-r", recipe_file, "-b", tmp_path / HOSTILE)
    done = in_process(*words, *where, *(["--json"] if as_json else []))
    text = done.stdout + done.stderr
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(text)
    assert ESCAPED in text or r"\u001b]0;x\u0007\u202e\u009b2J" in text
    if as_json and done.stdout:
        json.loads(done.stdout)
