"""cli/options.py: where settings come from, paths, and the result on stdout."""

import json
import os
import shutil
from pathlib import Path

import click
import pytest

from tutor.cli.options import Seconds


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
