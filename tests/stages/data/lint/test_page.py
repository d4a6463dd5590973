"""stages/data/lint/page.py: the HTML page of a report."""

from pathlib import Path

from support.html_pages import Page
from support.outputs.lint_rows import ANSWER, GOOD, lint_rows, row

from tutor.stages.data.lint.linter import lint
from tutor.stages.data.lint.page import lint_page


def test_page_shows_findings_and_is_well_formed(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, [*GOOD, GOOD[0]], [{"instruction": "¿Qué es una tupla frente a una función?"}])
    shown = Page(lint_page(report))
    assert shown.open == []
    assert f"repeats line {1}" in shown.text
    assert GOOD[0]["instruction"] in shown.text
    assert "rows to train on" in shown.text
    assert "¿Qué es una tupla frente a una función?" in shown.text


def test_page_marks_bars_over_the_limit(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, GOOD)
    lengths = report.figures["lengths"]
    last = lengths["bars"][-1]["start"]
    for limit, marked in ((None, 0), (last, 0), (last - 1, 1)):
        lengths["limit"] = limit
        assert lint_page(report).count('fill="var(--over)"') == marked


def test_page_has_no_script_and_no_external_resource(tmp_path: Path) -> None:
    html = lint_page(lint_rows(tmp_path, GOOD))
    shown = Page(html)
    assert not shown.names & {"script", "link", "img", "iframe", "object"}
    assert not {name for name in shown.attributes if name.startswith("on")} | shown.attributes & {"src", "href"}
    assert "url(" not in html
    assert "@import" not in html


def test_row_content_is_escaped(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="x"> {{ 7*7 }} \u202e\u0007\x1b[31m'
    rows = [row(evil, ANSWER, category=evil, topic="x"), row(evil, f"{ANSWER} Y más.", category=evil, topic="x")]
    html = lint_page(lint_rows(tmp_path, [*rows, *GOOD], [{"instruction": evil}]))
    assert "<script" not in html
    assert "<img" not in html
    assert "{{ 7*7 }}" in html
    assert not {"\u202e", "\u0007", "\x1b"} & set(html)


def test_page_of_an_empty_file_is_well_formed(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert Page(lint_page(lint([tmp_path / "empty.jsonl"], max_length=1024))).open == []
