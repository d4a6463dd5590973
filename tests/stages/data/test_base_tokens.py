"""stages/data/base_tokens.py: control tokens of the base in rows, before any training."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
from support.files import write_rows
from support.models.small_tokenizer import make_tokenizer, write_base
from support.outputs.lint_rows import GOOD, kinds_and_lines, lint_rows, row

from tutor.errors import DataError
from tutor.formats.rows.examples import Example, Prompt
from tutor.stages.data.base_tokens import control_token_finder, read_tokenizer, refuse_control_tokens

ANSWER = {"role": "assistant", "content": "d"}


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer.json with BOS, EOS and two more control tokens, as SmolLM2 has."""
    pytest.importorskip("transformers")
    made = make_tokenizer(add_bos=True)
    made.add_special_tokens({"additional_special_tokens": ["<filename>", "<file_sep>"]})
    made.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts_that_become_control_tokens_are_found(tokenizer_file: Path) -> None:
    find = control_token_finder(read_tokenizer(tokenizer_file))
    assert find("¿Qué hace `cat <filename>`?\nMuestra un archivo.") == ["<filename>"]
    assert find("¿Qué?\na<file_sep>b<filename>c<file_sep>") == ["<file_sep>", "<filename>"]
    assert find("¿Qué hace `cat < filename >`?\nUn `<FILENAME>`, o `<div>`.") == []


def test_row_with_a_control_token_is_refused_with_its_line(tokenizer_file: Path) -> None:
    find = control_token_finder(read_tokenizer(tokenizer_file))
    rows: list[Any] = [Example("a", "b", line=1), *(Example("a", "<filename>", line=n) for n in range(3, 28))]
    with pytest.raises(DataError, match="25 of 26 rows hold a control token of the base") as caught:
        refuse_control_tokens(Path("mine.jsonl"), rows, find)
    assert caught.value.code == 3
    assert caught.value.problems == tuple(f"mine.jsonl:{n}: holds <filename>" for n in range(3, 23))
    with pytest.raises(DataError) as of_prompts:
        refuse_control_tokens(Path("eval.jsonl"), [Prompt("cat <filename>", line=7)], find)
    assert of_prompts.value.problems == ("eval.jsonl:7: holds <filename>",)


def test_control_token_of_the_base_is_a_finding(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = [*GOOD, row("¿Qué hace `cat <filename>`?", category="a")]
    report = lint_rows(tmp_path, rows, tokenizer=tokenizer_file)
    assert kinds_and_lines(report) == [("special-token", len(rows))]
    assert report.findings[0].message == "holds <filename>, a control token of the base"
    assert lint_rows(tmp_path, rows).findings == ()


def test_data_check_refuses_a_control_token_of_the_base(
    tutor: Any, recipe_file: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "eval.jsonl", [{"instruction": "a"}, {"instruction": "¿Qué es <filename>?"}])
    command = ["data", "check", "--no-code", "-r", recipe_file, "-b", tmp_path / "build"]
    assert tutor(*command).returncode == 0
    write_base(tmp_path / "build" / "small" / "base", tokenizer_file)
    done = tutor(*command)
    assert done.returncode == 3
    assert f"{tmp_path}/eval.jsonl:2: holds <filename>" in done.stderr
    done = tutor("data", "check", tmp_path / "tutor.jsonl", *command[2:])
    assert done.returncode == 0, done.stderr


def test_data_check_names_an_answer_that_would_be_cut(
    tutor: Any, recipe_file: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    """The longest answer of a row of several turns is not its last one; without the setting nothing is cut."""
    write_base(tmp_path / "build" / "small" / "base", tokenizer_file)
    history = [{"role": "user", "content": "¿a?"}, {"role": "assistant", "content": "b " * 200}]
    with (tmp_path / "tutor.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": [*history, {"role": "user", "content": "¿c?"}, ANSWER]}) + "\n")
    lines = len((tmp_path / "tutor.jsonl").read_text("utf-8").splitlines())
    command = ["data", "check", "--no-code", "-r", recipe_file, "-b", tmp_path / "build"]
    assert "the answer has" not in tutor(*command).stdout
    recipe_file.write_text(recipe_file.read_text("utf-8") + "\n[generate]\nmax_new_tokens = 150\n", "utf-8")
    done = tutor(*command)
    assert done.returncode == 0, done.stderr
    named = f"{tmp_path}/tutor.jsonl:{lines}: the answer has "
    assert named in done.stdout
    done = tutor(*command, "--strict")
    assert done.returncode == 3
    assert named in done.stderr
