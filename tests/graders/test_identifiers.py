"""graders/identifiers.py: names that a correction lacks."""

import json
from typing import Any

import pytest
from support.processes.command import ROOT

from tutor.formats.markdown import fenced_blocks
from tutor.graders.identifiers import dropped_names


@pytest.mark.parametrize(
    ("given", "answered", "dropped"),
    [
        ("function a() {}", "const a = () => 1;", []),
        ("function a() {}", "function b() {}", ["a"]),
        ("const a = 1; const b = 2;", "const b = 3;", []),
        ("const a = 1; const b = 2;", "const c = 3;", ["a", "b"]),
        ("const a = 1; type T = 1;", "type T = 2;", []),
        ("enum Color { Rojo }", "const colores = { rojo: 1 };", []),
        ("const enum Color { Rojo }", "const x = 1;", ["Color"]),
        ("class A { leer(): void {} }", "class A { }", ["leer"]),
        ("interface A { leer(b: string): void }", "interface A { leer(): void }", []),
        ("class A { constructor() { if (a) { b(); } } }", "class A { }", []),
        ("// function oculta() {}\nlet a;", "let a = 1;", []),
        ("function $a() {}", "function $a(b: 1) {}", []),
        ("", "let a;", []),
        ("f(", "", []),
    ],
)
def test_dropped_names_of_given_and_answered_code(given: str, answered: str, dropped: list[str]) -> None:
    assert dropped_names([given], [answered]) == dropped


def corrections() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (ROOT / "data" / "tutor.jsonl").read_text("utf-8").splitlines()]
    return [row for row in rows if row["category"] == "correccion"]


def test_data_set_corrections_drop_no_names_and_others_do() -> None:
    texts = [
        (
            [block.code for block in fenced_blocks(row["instruction"])],
            [block.code for block in fenced_blocks(row["response"])],
        )
        for row in corrections()
    ]
    assert [given for given, answered in texts if dropped_names(given, answered)] == []
    foreign = [dropped_names(given, texts[number - 1][1]) for number, (given, _) in enumerate(texts)]
    assert sum(map(bool, foreign)) >= 0.95 * len(texts)
