"""Rows to lint, and the linter on them."""

import re
from pathlib import Path
from typing import Any

from support.files import write_rows
from tutor.stages.data.base_tokens import BaseTokens
from tutor.stages.data.lint.linter import LintReport, lint

ANSWER = "Es un valor que el compilador comprueba antes de ejecutar el programa, y nada más."


WORDS = re.findall(
    r"\w+",
    "interfaz genérico unión enum clase módulo tupla función promesa literal índice alias clave valor mapa conjunto "
    "lista bucle error aviso cadena número objeto método campo rango fecha precio pedido cliente",
)


def row(instruction: str, response: str = "", **other: Any) -> dict[str, Any]:
    """A row; without a `response` it gets an answer that no other row has."""
    return {"instruction": instruction, "response": response or f"{ANSWER} ({instruction})", **other}


def lint_rows(folder: Path, rows: list[Any], against: list[Any] | None = None, **options: Any) -> LintReport:
    """Write rows and prompts into a folder, and lint them."""
    write_rows(folder / "rows.jsonl", rows)
    if against is not None:
        write_rows(folder / "prompts.jsonl", against)
    held_out = folder / "prompts.jsonl" if against is not None else None
    if "tokenizer" in options:
        base = {name: options.pop(name) for name in ("prompt", "system") if name in options}
        options["base"] = BaseTokens(options.pop("tokenizer"), **base)
    return lint([folder / "rows.jsonl"], held_out, **{"max_length": 1024, **options})


def kinds_and_lines(report: LintReport) -> list[tuple[str, int]]:
    """Kind and line of each finding."""
    return [(each.kind, each.line) for each in report.findings]


GOOD = [
    row(f"¿Qué es {a} frente a {b}?", category="abc"[n % 3])
    for n, (a, b) in enumerate(zip(WORDS[::2], WORDS[1::2], strict=True))
]
