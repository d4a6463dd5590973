"""graders/code.py and stages/data/code_check.py, with a fake and (marked typescript) the real compiler."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes.typescript import runs
from support.files import write_rows
from support.processes.command import ROOT

from tutor.cli.commands.data import check_command
from tutor.errors import DataError, HostError
from tutor.graders.code import CodeRow, check_rows, earlier_code, fold_text, grade_answers, parse_spec


def problems(*code: str, question: str = "", answer: str = "") -> list[str]:
    return [text for _, text in check_rows([CodeRow(question, answer, code, 7)]).problems]


def block(*lines: str, language: str = "ts") -> str:
    return f"```{language}\n" + "".join(f"{line}\n" for line in lines) + "```\n"


# Rows


def test_blocks_that_meet_their_specification_are_counted(fake_compiler: Path) -> None:
    text = block("a;") + block("TS2322", "TS2345", "TS2322") + block("TS1005")
    assert problems("ok", "TS2345,TS2322", "TS1005", answer=text) == []
    checked = check_rows([CodeRow("", text, ("ok", "TS2322, TS2345", "-"), 1)])
    assert (checked.compiled, checked.failed_as_stated, checked.unchecked) == (1, 1, 1)


@pytest.mark.parametrize(
    ("code", "text", "message"),
    [
        ("ok", block("a;", "TS2322"), "must compile, but: TS2322 in line 2: said"),
        ("TS2322", block("a;"), "must fail with TS2322, but: it compiles"),
        ("TS2322", block("TS2322", "TS2345"), "must fail with TS2322, but: TS2322 in line 1"),
        ("TS2322,TS2345", block("TS2322"), "must fail with TS2322, TS2345, but"),
        ("ok", block("let x: any;"), "must compile, but: suppressed in line 1: any"),
        ("TS2322", block("// @ts-ignore", "TS2322"), "but: suppressed"),
        ("ok", block("// nada"), "but: no_code"),
    ],
)
def test_block_that_misses_its_specification_is_a_problem(
    fake_compiler: Path, code: str, text: str, message: str
) -> None:
    (problem,) = problems(code, answer=text)
    assert problem.startswith("block 1 (answer, line 2)")
    assert message in problem


def test_block_is_compiled_after_the_blocks_that_it_needs(fake_compiler: Path) -> None:
    question, answer = block("has-Pedido"), block("needs-Pedido") + block("needs-Total") + block("has-Total")
    assert problems("ok", "ok +1", "ok +4", "ok", question=question, answer=answer) == []
    assert len(problems("ok", "ok", "ok +2 +1", "ok", question=question, answer=answer)) == 2


@pytest.mark.parametrize("spec", ["", "OK", "TS", "ok+1", "TS2322 TS2345", "ok +0", "ok +1", "ok +3", "--"])
def test_invalid_specification_is_a_problem(fake_compiler: Path, spec: str) -> None:
    (problem,) = problems(spec, "ok", answer=block("a;") + block("b;"))
    assert "code" in problem


def test_rows_without_code_must_compile_every_block(fake_compiler: Path) -> None:
    assert problems(answer=block("TS2322", language="python") + block("a;")) == []
    assert len(problems(answer=block("TS2322", language="typescript"))) == 1


def test_specification_is_parsed() -> None:
    assert parse_spec("ok") == (frozenset(), [])
    assert parse_spec("TS2322,TS2345 +1 +3") == (frozenset({"TS2322", "TS2345"}), [1, 3])


# tutor data check


def check(tmp_path: Path, *options: str, code: str = "ok") -> Any:
    rows = [{"instruction": "¿A?", "response": block("a;"), "code": ["ok"]}]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"instruction": "¿B?", "response": block("TS2322"), "code": [code]}])
    return CliRunner().invoke(check_command, [str(tmp_path / "rows.jsonl"), *options])


def test_data_check_compiles_blocks_unless_no_code(fake_compiler: Path, tmp_path: Path) -> None:
    done = check(tmp_path, code="TS2322")
    assert "2 rows ok; 1 blocks compile, 1 fail as stated" in done.stdout
    assert "blocks" not in check(tmp_path, "--no-code").stdout


def test_data_check_reports_file_and_line_of_failing_code(fake_compiler: Path, tmp_path: Path) -> None:
    fault = check(tmp_path).exception
    assert isinstance(fault, DataError)
    path = tmp_path / "rows.jsonl"
    assert fault.problems[0].startswith(f"{path}:2: block 1 (answer, line 2) must compile, but: TS2322 in line 1")


def test_data_check_without_compiler_prints_note_or_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path))
    done = check(tmp_path)
    assert done.exit_code == 0
    assert "code was not compiled" in done.stdout
    assert isinstance(check(tmp_path, "--code").exception, HostError)
    assert "not compiled" not in check(tmp_path, "--no-code").stdout


# Answers


def graded(text: str, **prompt: Any) -> dict[str, Any]:
    """The verdict on an answer, graded together with a prompt that requires code."""
    beside: dict[str, Any] = {"instruction": "¿?", "expect": {"code": True}}
    prompts = [{"instruction": "¿?", **prompt}] + [beside] * ("expect" not in prompt)
    verdict = grade_answers(prompts, [text, ""][: len(prompts)])[0]
    json.dumps(verdict)
    return verdict


def test_answer_compiles_if_all_its_blocks_compile(fake_compiler: Path) -> None:
    assert graded(block("a;") + block("b;"))["compiles"]
    assert graded(block("a;") + block("TS2322"))["outcome"] == "type_error"
    assert graded("Sin código.")["outcome"] == "no_code"
    assert graded(block("let x: any;") + block("TS1005"))["outcome"] == "suppressed"
    assert graded(block("a;") + block("x", language="bash"))["compiles"]


def test_block_may_use_the_blocks_before_it(fake_compiler: Path) -> None:
    assert graded(block("has-Pedido") + block("needs-Pedido"))["compiles"]
    assert not graded(block("needs-Pedido") + block("has-Pedido"))["compiles"]


def test_block_may_use_the_code_of_earlier_answers(fake_compiler: Path) -> None:
    asked = {"role": "user", "content": block("has-Total")}
    history = [asked, {"role": "assistant", "content": "Así:\n" + block("has-Pedido")}]
    assert graded(block("needs-Pedido") + block("needs-Pedido"), history=history)["compiles"]
    assert not graded(block("needs-Pedido"), history=history[:1])["compiles"]
    assert not graded(block("needs-Total"), history=history)["compiles"], "the answer must declare it, as in one turn"
    row = CodeRow("¿Y?", block("needs-Pedido") + block("needs-Pedido"), ("ok", "ok +1"), 1, earlier_code(history))
    assert check_rows([row]).problems == ()
    assert len(check_rows([replace(row, earlier="")]).problems) == 2
    assert len(check_rows([replace(row, code=("TS2322", "ok"))]).problems) == 1


def test_words_are_found_without_case_and_accents(fake_compiler: Path) -> None:
    expect = {"include": [["inferencia", "inferir"], ["Función"]], "exclude": ["as  const"]}
    good = graded("La INFERENCIA de una\nfuncion.\n" + block("a;"), expect=expect)
    assert (good["expected"], good["missing"], good["forbidden"]) == (True, [], [])
    bad = graded("Infiere AS\nconst.\n" + block("a;"), expect=expect)
    assert (bad["expected"], bad["missing"], bad["forbidden"]) == (
        False,
        [["inferencia", "inferir"], ["Función"]],
        ["as  const"],
    )


def test_correction_needs_question_failing_as_stated(fake_compiler: Path) -> None:
    question = "¿Por qué falla?\n" + block("TS2322")
    assert graded(block("a;"), instruction=question, code=["TS2322"])["expected"]
    assert graded(block("a;"), instruction=question, code=["TS2322"])["given_fails"] is True
    assert graded(block("a;"), instruction=question, code=["TS2345"])["expected"] is False
    assert graded(block("TS2322"), instruction=question, code=["TS2322"])["expected"] is False
    assert graded(block("a;"), instruction=question)["given_fails"] is None


def test_unneeded_code_may_be_missing_but_must_compile(fake_compiler: Path) -> None:
    assert graded("Nada.", expect={"code": False})["compiles"]
    assert graded("Nada.", expect={"code": False})["expected"]
    assert graded("Nada.")["compiles"], "a prompt without expectations demands no code"
    assert not graded("Nada.", expect={"include": [["nada"]]})["compiles"]
    assert not graded("Nada.", expect={"code": True})["expected"]
    prompts = [{"instruction": "¿?", "expect": {"code": wanted}} for wanted in (False, True)]
    assert not grade_answers(prompts, [block("TS2322"), ""])[0]["expected"]


def test_prompts_that_want_no_code_need_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path))
    good = graded("Una tupla.\n" + block("TS2322"), expect={"code": False, "include": [["TUPLA"]]})
    assert (good["compiles"], good["expected"]) == (True, True)
    assert check_rows([CodeRow("¿?", "Sí.")]).problems == ()
    with pytest.raises(HostError):
        graded(block("a;"), expect={"include": [["tupla"]]})


def test_answers_are_compiled_in_one_run_in_order(fake_compiler: Path) -> None:
    texts = [block("a;"), block("TS2322"), "", block("TS1005"), "x" * (2**20 + 1)]
    verdicts = grade_answers([{"instruction": "¿?", "expect": {"code": True}}] * len(texts), texts)
    assert [each["outcome"] for each in verdicts] == ["pass", "type_error", "no_code", "syntax_error", "grader_error"]
    assert len(runs(fake_compiler)) == 2


@given(st.text())
@settings(max_examples=50)
def test_fold_is_idempotent(text: str) -> None:
    assert fold_text(fold_text(text)) == fold_text(text)


# The real compiler


@pytest.mark.typescript
@pytest.mark.parametrize("name", ["tutor.jsonl", "eval.jsonl"])
def test_every_block_of_the_data_set_meets_its_specification(compiler: Path, name: str) -> None:
    rows = [json.loads(line) for line in (ROOT / "data" / name).read_text("utf-8").splitlines()]
    checked = check_rows(
        [CodeRow(row["instruction"], row.get("response", ""), row["code"], line) for line, row in enumerate(rows, 1)]
    )
    assert checked.problems == ()
    assert checked.compiled + checked.failed_as_stated == sum(len(row["code"]) for row in rows)
    assert checked.failed_as_stated >= 20
