"""cli/commands/matrix.py: what it prints and writes, and its exit codes; no cell is run."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tutor.cli.commands.matrix import matrix_command
from tutor.engines.ollama import health
from tutor.errors import GateError, RecipeError
from tutor.serving import matrix
from tutor.serving.matrix import Cell, Outcome


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that were run: those of qwen3 fail, the others succeed; no server is there."""
    found: list[Cell] = []

    def run(cell: Cell, _folder: Path, _host: str | None, *, served: bool) -> Outcome:
        assert not served
        found.append(cell)
        return Outcome(cell, (), 1.0, "", "it diverges" if cell.family == "qwen3" else "")

    monkeypatch.setattr(matrix, "make_models", lambda *_: None)
    monkeypatch.setattr(matrix, "run_cell", run)
    monkeypatch.setattr(health, "absence", lambda *_: "no Ollama")
    return found


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(matrix_command, [str(argument) for argument in arguments], obj={"quiet": True})


def test_chosen_cells_run_and_the_result_is_written(ran: list[Cell], tmp_path: Path) -> None:
    done = command("llama", "gemma3_text", "--prompt", "tutor", "--build", tmp_path, "--json")
    assert (done.exit_code, ran) == (0, [Cell("llama"), Cell("gemma3_text")])
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "matrix" / "matrix.json").read_text("utf-8"))
    assert [each["cell"]["family"] for each in printed["cells"]] == ["llama", "gemma3_text"]
    assert "gemma3_text tutor" in (tmp_path / "matrix" / "matrix.txt").read_text("utf-8")


def test_failed_cell_is_the_exit_code_after_the_table(ran: list[Cell], tmp_path: Path) -> None:
    done = command("qwen3", "llama", "--build", tmp_path)
    assert done.exit_code == GateError.code
    assert {cell.family for cell in ran} == {"qwen3", "llama"}
    assert "llama tutor" in done.stdout
    assert "it diverges" in done.stderr


def test_unknown_family_is_refused_with_the_list(ran: list[Cell], tmp_path: Path) -> None:
    done = command("qwen4", "--build", tmp_path)
    assert (done.exit_code, ran) == (RecipeError.code, [])
    assert "'qwen4'; known: llama, " in done.stderr
