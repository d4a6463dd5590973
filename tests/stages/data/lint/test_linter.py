"""stages/data/lint/linter.py and rows.py: each kind of finding with its line, and what is no finding."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows
from support.outputs.lint_rows import ANSWER, GOOD, WORDS, kinds_and_lines, lint_rows, row
from support.processes.command import ROOT

from tutor.errors import DataError, RecipeError
from tutor.stages.data.lint.linter import KINDS, NEAR, lint
from tutor.stages.data.lint.rows import LISTED, SAMPLE


def test_good_rows_have_no_finding(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, GOOD, [{"instruction": "¿Para qué sirve el operador de propagación?"}])
    assert (report.findings, report.counts) == ((), {})
    assert report.figures["rows"] == len(GOOD)
    json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("extra", "kind", "text"),
    [
        ({"instruction": "¿Y la respuesta?"}, "schema", "lacks response"),
        (["no", "object"], "schema", "is a list"),
        (row("¿Cómo?", "Así: <|im_end|> y ya."), "special-token", "<|im_end|>"),
        (row("¿Cómo?", "Pon [INST] delante de todo y nada más, como antes."), "special-token", "[INST]"),
        (row("¿Cómo?", "Al final </s> se acaba el texto que se ha escrito."), "special-token", "</s>"),
        (row("¿Cómo?", f"{ANSWER}\n\n```ts\nlet x = 1;"), "fence", "in response does not close"),
        (row("¿Cómo va?\n~~~\nx", ANSWER), "fence", "in instruction does not close"),
        (row("¿Cómo?", f"{ANSWER} " * 50), "length", "4155 characters; train.max_length is 1024 tokens"),
        (row("  ¿QUE es interfaz frente a genérico ", GOOD[0]["response"]), "duplicate", "repeats line 1"),
        (row("¿Qué es interfaz frente a genérico?", "No dice lo mismo, ni mucho menos."), "contradiction", "line 1"),
        (row("¿Qué es la interfaz frente a genérico?", "Tampoco dice lo mismo."), "near-duplicate", "line 1"),
        (row("¿Para qué sirve un valor?", GOOD[2]["response"]), "same-answer", "line 3"),
        (row("Where is it?", "The compiler checks every value before it runs."), "language", "not Spanish"),
        (row("¿Y este otro?", category=""), "balance", "no category"),
    ],
)  # fmt: skip
def test_each_fault_is_found_on_its_line_alone(tmp_path: Path, extra: Any, kind: str, text: str) -> None:
    if isinstance(extra, dict) and "response" in extra:
        extra = {"category": "a", **extra}
    report = lint_rows(tmp_path, [*GOOD, extra])
    assert kinds_and_lines(report) == [(kind, len(GOOD) + 1)]
    assert report.counts == {kind: 1}
    assert text in report.findings[0].message
    assert report.findings[0].file == str(tmp_path / "rows.jsonl")


def test_kinds_of_findings_are_described() -> None:
    assert {"schema", "leak", "near-leak", "unknown-key"} < set(KINDS)


def test_unusable_rows_do_not_hide_other_findings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD[0])
    path.write_text(f"{good}\nno es JSON\n\n{good}\n{{\n", "utf-8")
    report = lint([path], max_length=1024)
    assert kinds_and_lines(report) == [("schema", 2), ("schema", 5), ("duplicate", 4)]
    assert report.files == {str(path): {"rows": 4, "unusable": 2, "blank_lines": 1}}


def test_empty_file_is_a_finding_and_no_file_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert kinds_and_lines(lint([tmp_path / "empty.jsonl"], max_length=1024)) == [("schema", 0)]
    with pytest.raises(RecipeError, match="cannot be opened"):
        lint([tmp_path / "none.jsonl"], max_length=1024)
    (tmp_path / "wide.jsonl").write_text("{}", "utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        lint([tmp_path / "wide.jsonl"], max_length=1024)


def test_unknown_keys_are_reported_once(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, [{**each, "author": "x"} for each in GOOD])
    assert [(each.kind, each.line, each.message) for each in report.findings] == [
        ("unknown-key", 0, f"author in {len(GOOD)} rows")
    ]


def test_leaks_are_found_exact_and_near(tmp_path: Path) -> None:
    prompts = [{"instruction": "Otra cosa que nadie pregunta"}, {"instruction": "¿que es ENUM frente a unión"}]
    near = {"instruction": "¿Qué es un módulo, frente a una clase?"}
    rows = [*GOOD, row("¿Qué es unión frente a enum?", category="a"), row("¿Qué es enum frente a unión?", category="a")]
    report = lint_rows(tmp_path, [*rows, row("¿Qué es módulo frente a una clase?", category="a")], [*prompts, near])
    leaks = [each for each in report.findings if "leak" in each.kind]
    assert [(each.kind, each.line) for each in leaks] == [("leak", len(rows)), ("near-leak", len(rows) + 1)]
    assert leaks[0].message == f"is also {tmp_path / 'prompts.jsonl'}:2"
    assert report.figures["nearest"]["highest"] == 1.0
    assert report.figures["nearest"]["closest"][0]["prompt"] == 2


def test_prompts_are_linted_but_not_counted_as_rows(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, GOOD, [{"instruction": "¿Y esto?"}, {"instruction": "¿y ESTO?"}, {"expect": {}}])
    assert [(each.kind, each.file, each.line) for each in report.findings] == [
        ("schema", str(tmp_path / "prompts.jsonl"), 3),
        ("duplicate", str(tmp_path / "prompts.jsonl"), 2),
    ]
    assert report.figures["rows"] == len(GOOD)


def test_repeat_in_another_file_names_that_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", GOOD[:3])
    write_rows(tmp_path / "b.jsonl", GOOD[2:4])
    (finding,) = lint([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], max_length=1024).findings
    assert (finding.file, finding.line) == (str(tmp_path / "b.jsonl"), 1)
    assert finding.message == f"repeats {tmp_path / 'a.jsonl'}:3"


def test_file_on_both_sides_is_a_recipe_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(RecipeError, match="both"):
        lint([tmp_path / "a.jsonl"], tmp_path / "a.jsonl", max_length=1024)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(RecipeError, match="both"):
        lint([tmp_path / "a.jsonl"], tmp_path / "link.jsonl", max_length=1024)


def test_file_with_expectations_is_linted_as_prompts(tmp_path: Path) -> None:
    assert (
        lint_rows(tmp_path, [{"instruction": "¿Y?", "expect": {"code": False}}, {"instruction": "¿Cómo?"}]).findings
        == ()
    )


def test_set_in_another_language_has_no_language_findings(tmp_path: Path) -> None:
    answer = "The compiler checks the {0} before the program runs, and nothing else happens to the {0}."
    rows = [row(f"What is {word}?", answer.format(word)) for word in WORDS]
    report = lint_rows(tmp_path, rows)
    assert report.findings == ()
    assert report.figures["language"]["in_language"] == 0
    assert report.figures["language"]["judged"] == len(rows)


def test_rows_without_prose_have_no_language(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, [*GOOD, row("`x`", "```ts\nlet x = 1;\n```", category="a")])
    assert report.findings == ()
    assert report.figures["language"] == {
        "language": "es", "rows": len(GOOD) + 1, "judged": len(GOOD), "in_language": len(GOOD)
    }  # fmt: skip


def test_category_with_few_rows_is_found(tmp_path: Path) -> None:
    rows = [{**each, "category": "a"} for each in GOOD[:-1]] + [{**GOOD[-1], "category": "b"}]
    (finding,) = lint_rows(tmp_path, rows).findings
    assert (finding.kind, finding.line) == ("balance", 0)
    assert finding.message == f"category 'b': 1 of {len(GOOD)} rows, an equal share is {len(GOOD) // 2}"


def test_findings_are_all_counted_and_the_first_kept(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, [GOOD[0]] * (LISTED + 51))
    assert report.counts == {"duplicate": LISTED + 50}
    assert len(report.findings) == LISTED


@pytest.mark.slow
def test_memory_of_a_row_does_not_grow_with_its_texts(tmp_path: Path) -> None:
    def peak(characters: int) -> int:
        rows = (row(f"¿Qué es {i} {WORDS[i % 30]}?", f"{i} " + "x" * characters) for i in range(SAMPLE + 2000))
        write_rows(tmp_path / "rows.jsonl", list(rows))
        tracemalloc.start()
        lint([tmp_path / "rows.jsonl"], max_length=10**6)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    short, long = peak(100), peak(2100)
    assert long - short < 2000 * (SAMPLE + 1000), "the texts of the sample, and of no other row"


def test_sample_is_equal_in_every_run(tmp_path: Path) -> None:
    rows = [row(f"¿Qué es {i} {WORDS[i % 30]}?") for i in range(SAMPLE + 500)]
    first, second = (lint_rows(tmp_path, rows).figures["language"] for _ in range(2))
    assert first == second
    assert first["rows"] == SAMPLE


def test_bundled_rows_have_no_finding() -> None:
    report = lint([ROOT / "data" / "tutor.jsonl"], ROOT / "data" / "eval.jsonl", max_length=1024)
    assert report.findings == ()
    assert report.figures["rows"] == 278
    assert report.figures["nearest"]["highest"] < NEAR
