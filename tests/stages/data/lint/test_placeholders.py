"""stages/data/lint/placeholders.py: texts that nobody filled in, and code that only looks like them."""

import json

import pytest
from support.outputs.lint_rows import ANSWER, kinds_and_lines, lint_rows, row
from support.processes.command import ROOT

from tutor.stages.data.lint.placeholders import find_placeholder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hola, soy {{name}}, de {{author}}.", "{{name}}"),
        ("Soy {{ tu nombre }}.", "{{ tu nombre }}"),
        ("Estimado <your name>:", "<your name>"),
        ("Estimado <TU_NOMBRE>:", "<TU_NOMBRE>"),
        ("Estimado [Insert Name Here],", "[Insert Name Here]"),
        ("Estimado [NOMBRE],", "[NOMBRE]"),
        ("Un saludo, [COMPANY NAME]", "[COMPANY NAME]"),
        ("Escribe a NAME_1.", "NAME_1"),
        ("Lorem ipsum dolor sit amet.", "Lorem ipsum"),
        ("Un `Array<string>` y un Record<string, number>.", None),
        ("El estilo `{{color}}` de Vue.", None),
        ("```tsx\n<div style={{color}}>[NAME]</div>\n```", None),
        ("Véase [NOMBRE](https://example.org) y [NAME]: un enlace.", None),
        ("const [name, setName] = useState<YourType>()", None),
        ("type T = [string, number]; T[NAME_KEY]; <T extends Y>", None),
        ("La respuesta es [OK] o [ERROR].", None),
    ],
)
def test_placeholder_in_prose_is_found_and_code_is_not(text: str, expected: str | None) -> None:
    assert find_placeholder(text) == expected


def test_placeholder_is_a_finding_with_its_line(tmp_path) -> None:
    report = lint_rows(tmp_path, [row(0), {"instruction": "¿Quién eres?", "response": f"Soy {{{{name}}}}. {ANSWER}"}])
    assert ("placeholder", 2) in kinds_and_lines(report)


@pytest.mark.parametrize("name", ["tutor.jsonl", "eval.jsonl", "general.jsonl", "paraphrases.jsonl"])
def test_shipped_rows_have_no_placeholder(name: str) -> None:
    for line in (ROOT / "data" / name).read_text("utf-8").splitlines():
        found = json.loads(line)
        assert [find_placeholder(found.get(key, "")) for key in ("instruction", "response")] == [None, None]
