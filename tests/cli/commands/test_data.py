"""cli/commands/data.py: data check. tests/stages/data covers the options of lint and of the compiler."""

import json
import shutil

import pytest
from support.files import write_rows
from support.processes.command import ROOT, in_process


def test_wrong_rows_are_listed_with_file_and_line(tutor, tmp_path):
    write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b"}, {"instruction": "c"}, {"response": "d"}]
    )
    done = tutor("data", "check", tmp_path / "rows.jsonl")
    assert done.returncode == 3
    assert [line.split(" ")[2] for line in done.stderr.splitlines()[1:]] == [
        f"{tmp_path}/rows.jsonl:2:",
        f"{tmp_path}/rows.jsonl:3:",
    ]


def test_check_names_a_language_that_is_not_set(tmp_path):
    shutil.copy(ROOT / "tests" / "support" / "cooking.jsonl", tmp_path / "tutor.jsonl")
    notes = {}
    for language in ("es", "fr", "any"):
        (tmp_path / "r.toml").write_text(f'[data]\nlanguage = "{language}"\n', "utf-8")
        done = in_process("data", "check", "--no-code", "-r", tmp_path / "r.toml", "-b", tmp_path / "build")
        notes[language] = [line for line in done.stdout.splitlines() if "note:" in line]
    expected = "  note: the questions are not Spanish, the language of data.language = 'es': correct one"
    assert notes == {"es": [expected], "fr": [], "any": []}


@pytest.mark.parametrize("command", ["check", "lint", "stats", "split"])
def test_recipe_without_eval_reads_its_rows_alone(command, tmp_path):
    shutil.copy(ROOT / "tests" / "support" / "cooking.jsonl", tmp_path / "tutor.jsonl")
    write_rows(tmp_path / "eval.jsonl", [{"instruction": "not named, so not read"}])
    recipe = tmp_path / "cuisine.toml"
    recipe.write_text('[data]\nlanguage = "fr"\nheld_out = 0.2\n', "utf-8")
    done = in_process("data", command, "--json", "-r", recipe, "-b", tmp_path / "build")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if command == "check":
        assert [(item["file"], item["rows"]) for item in result] == [(str(tmp_path / "tutor.jsonl"), 60)]
    elif command == "lint":
        assert list(result["files"]) == [str(tmp_path / "tutor.jsonl")]
        assert (result["counts"], result["figures"]["nearest"]) == ({}, None)
        assert result["figures"]["language"]["in_language"] == 60
    elif command == "stats":
        assert result["questions"] == 60
    else:
        assert (result["results"]["held_out"], result["results"]["prompts"]) == (12, 12)
