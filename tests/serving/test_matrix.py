"""serving/matrix.py: cells, their rows and recipes, outcomes and the table.

The nightly workflow runs every cell.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes.ollama import FakeOllama

from tutor.errors import GateError, HostError, TutorError
from tutor.formats.architectures import ARCHITECTURES
from tutor.formats.rows.jsonl import Limits
from tutor.formats.rows.rows import ExampleRow, PromptRow, read_rows
from tutor.recipe.settings import Recipe
from tutor.serving import matrix
from tutor.serving.matrix import Cell, Outcome
from tutor.stages.base.tiny_families import FAMILIES, WINDOWED
from tutor.stages.parity.compare import Comparison
from tutor.stages.parity.gate import SAME_FILE, HandOff

CELLS = matrix.cells(tuple(FAMILIES))
SAME = HandOff(
    "merge", "base + adapter", "merged", (Comparison("log-probabilities", ok=True, figures={"mean": 0.00123}, what=""),)
)
OTHER = HandOff("publish", "Q8_0", "Ollama", (Comparison("tokens", ok=False, figures={}, what="12 and 13"),), SAME_FILE)


def outcome(problem: str = "", *hand_offs: HandOff) -> dict[str, Any]:
    records = tuple(item.record() for item in hand_offs)
    return Outcome(Cell("qwen3", "base", "rows"), records, 12.4, "0.34.4", problem).record()


@pytest.mark.parametrize("prompt", matrix.PROMPTS)
def test_cells_hold_every_family_with_each_prompt(prompt: str) -> None:
    assert {FAMILIES[cell.family].model_type for cell in CELLS if cell.prompt == prompt} == set(ARCHITECTURES)
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_base_prompt_has_each_reasoning_of_its_template() -> None:
    found = [cell.reasoning for cell in matrix.cells(("qwen3",))]
    assert found == ["none", "none", "empty", "rows"]


@pytest.mark.parametrize("name", [matrix.ROWS, matrix.THOUGHTS])
def test_rows_are_read_without_a_note(tmp_path: Path, name: str) -> None:
    matrix.write_rows(tmp_path)
    rows, notes = read_rows(tmp_path / name, ExampleRow, strict=True, limits=Limits())
    prompts, _ = read_rows(tmp_path / matrix.ASKED, PromptRow, strict=True, limits=Limits())
    assert notes.warnings() == []
    asked = {prompt.instruction for _, prompt in prompts}
    assert asked
    assert asked.isdisjoint(row.instruction for _, row in rows)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_recipe_of_a_cell_names_its_files_and_prompt(cell: Cell, tmp_path: Path) -> None:
    recipe = matrix.write_recipe(cell, tmp_path)
    rows = matrix.THOUGHTS if cell.reasoning == "rows" else matrix.ROWS
    assert recipe.resolve(recipe.data.train) == tmp_path / rows
    assert recipe.resolve(recipe.base.source.removeprefix("path:")) == tmp_path / matrix.MODELS / cell.family
    assert (recipe.prompt, recipe.reasoning, recipe.name) == (cell.prompt, cell.reasoning, cell.name)
    assert recipe.ollama.model.startswith("tutor-matrix-")
    assert recipe.train.max_length == recipe.generate.context == (128 if cell.family == WINDOWED else matrix.LENGTH)


def test_refusal_of_a_stage_is_the_problem_of_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        error = GateError("merged -> F16 diverges", "look at it")
        error.stage = "parity"
        raise error

    made = SimpleNamespace(results={"hand_offs": [SAME.record()]}, seconds=2.0)
    old = SimpleNamespace(stage=SimpleNamespace(name="merge"), condition="stale", manifest=made)
    refused = SimpleNamespace(stage=SimpleNamespace(name="parity"), condition="refused", manifest=made)
    monkeypatch.setattr(matrix.runner, "run_all", refuse)
    monkeypatch.setattr(matrix.runner, "inspect", lambda *_: [old, refused])
    found = matrix.run_cell(Cell("llama"), tmp_path, None, served=True)
    assert found.problem == "parity: merged -> F16 diverges; look at it"
    assert (found.hand_offs, found.seconds) == ((SAME.record(),), 2.0)


def test_missing_program_ends_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: Any) -> None:
        raise HostError("llama.cpp is not built", "make llamacpp")

    monkeypatch.setattr(matrix.runner, "run_all", lack)
    with pytest.raises(HostError):
        matrix.run_cell(Cell("llama"), tmp_path, None, served=False)


def test_published_model_is_compared_and_deleted(recipe: Recipe, build: Path, server: FakeOllama) -> None:
    found = matrix.publish_once(recipe, build, server.host)
    assert found["parity"]["state"] == "same"
    assert server.bodies("POST /api/create") != []
    assert server.models == {}


def test_table_has_figures_states_problems_and_versions() -> None:
    result = {"cells": [outcome("", SAME), outcome("it diverges", OTHER)], "versions": {"llama.cpp": "1", "gguf": "2"}}
    head, good, bad, problem, made_with = matrix.table(result)
    assert head.split() == ["family,", "prompt", "merge", "convert", "Q8_0", "Ollama", "seconds"]
    assert good.split() == ["qwen3", "base", "rows", "0.0012", "-", "-", "-", "12"]
    assert bad.split() == ["qwen3", "base", "rows", "-", "-", "-", "diverges", "12"]
    assert problem == "qwen3 base rows: it diverges"
    assert made_with == "Made with llama.cpp 1; gguf 2"


def test_versions_name_the_server_or_why_there_is_none() -> None:
    compared = Outcome(Cell("llama"), (), 1.0, "0.34.4")
    assert matrix.versions([compared, compared], None)["Ollama"] == "0.34.4"
    assert matrix.versions([], "no Ollama at here")["Ollama"] == "no Ollama at here"


def test_error_without_a_stage_is_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TutorError("the server is gone")

    monkeypatch.setattr(matrix.runner, "run_all", lambda *_: [])
    monkeypatch.setattr(matrix.runner, "inspect", lambda *_: [])
    monkeypatch.setattr(matrix.publish, "publish", fail)
    assert matrix.run_cell(Cell("llama"), tmp_path, None, served=True).problem == "the server is gone"
