"""Commands in hints and errors can be pasted into a shell: what a user named is quoted."""

import ast
import re
from pathlib import Path

from support.processes.command import ROOT

COMMAND = re.compile(
    r"\b(?:(?:rm|mv|cp|ls|cd|cat|chmod|chown)\s(?:-\S+\s)*"
    r"|(?:tutor|make|docker|ollama|pip|python|git|sudo)\s(?:[^;:.`]*\s)?(?:-[a-z]\s|--[a-z-]+[ =]|[A-Z]+=)"
    r"|tutor (?:(?:data )?(?:check|lint|stats)|verify|compare)\s)$"
)
"""Beginning of a command whose next word is the name of a file: a program for files, an option, an argument."""
QUOTED = re.compile(r"shlex\.(quote|join)\(|_quoted\(")
NO_FILES = ("tutor run --until ",)
"""Beginnings whose next word is no name of a file."""


def unquoted(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
                continue
            if COMMAND.search(text) and not text.endswith(NO_FILES) and not QUOTED.match(ast.unparse(part)[1:]):
                found.append(f"{path.name}:{node.lineno} {text}")
            text += "value"
    return found


def test_paths_in_commands_are_quoted() -> None:
    assert [line for path in sorted((ROOT / "tutor").rglob("*.py")) for line in unquoted(path)] == []


def test_unquoted_path_in_a_command_is_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('f"{path} is damaged; rm -r {path}"\nf"rm -r {shlex.quote(path)}"\nf"run: tutor run -r {path}"\n')
    assert [line.partition(" ")[0] for line in unquoted(module)] == ["module.py:1", "module.py:3"]
