"""stages/data/held_out_prompts.py: the questions of held-out rows as prompts, and what they demand."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.files import read_rows, write_rows
from support.processes.command import ROOT

from tutor.formats.rows.examples import Example
from tutor.graders.code import wants_code
from tutor.recipe.settings import DataSettings, Recipe
from tutor.stages.data import stage
from tutor.stages.data.held_out_prompts import prompts_of_rows

COOKING = ROOT / "tests" / "support" / "cooking.jsonl"
TS = "```ts\nlet a = 1;\n```"


def run(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    write_rows(folder / "rows.jsonl", rows)
    recipe = Recipe(data=DataSettings(train="rows.jsonl", **settings), path=folder / "r.toml")
    return stage.run(recipe, {}, folder / "out")


def test_recipe_without_eval_asks_the_held_out_rows(tmp_path: Path) -> None:
    summary = run(tmp_path, read_rows(COOKING), held_out=0.2)
    assert (summary["train"], summary["held_out"], summary["prompts"], summary["notes"]) == (48, 12, 12, [])
    held_out, prompts = (read_rows(tmp_path / "out" / f"{name}.jsonl") for name in ("held_out", "prompts"))
    for row, prompt in zip(held_out, prompts, strict=True):
        assert [prompt[key] for key in ("instruction", "reference", "category", "line")] == [
            row[key] for key in ("instruction", "response", "category", "line")
        ]
        assert not wants_code(prompt)
    trained = {row["instruction"] for row in read_rows(tmp_path / "out" / "train.jsonl")}
    assert trained.isdisjoint(prompt["instruction"] for prompt in prompts)
    assert "eval" not in json.loads((tmp_path / "out" / "statistics.json").read_text("utf-8"))["notes"]


def test_prompts_limit_how_many_held_out_rows_are_asked(tmp_path: Path) -> None:
    assert run(tmp_path, read_rows(COOKING), held_out=0.3, prompts=10)["prompts"] == 10


def test_few_held_out_questions_give_a_note(tmp_path: Path) -> None:
    (note,) = run(tmp_path, read_rows(COOKING)[:20])["notes"]
    assert note.startswith("2 held-out questions are too few for an interval")


def test_prompts_of_another_subject_give_a_note(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "eval.jsonl", [{"instruction": "¿Qué es `never`?", "category": "definicion", "topic": "tipos"}]
    )
    (note,) = run(tmp_path, read_rows(COOKING), eval="eval.jsonl")["notes"]
    assert note.startswith("eval.jsonl: no row of rows.jsonl has the category and topic of a prompt")


@pytest.mark.parametrize(
    ("response", "code", "demands"),
    [
        ("Du beurre.", (), {}),
        ("```python\nx = 1\n```", (), {}),
        (f"Así: {TS}".replace(": ", ":\n\n"), (), {"code": True}),
        (TS, ("ok",), {"code": True}),
        (TS, ("TS2322",), {"code": False}),
        (TS, ("-",), {"code": False}),
    ],
)
def test_code_is_demanded_where_the_reference_compiles(
    response: str, code: tuple[str, ...], demands: dict[str, bool]
) -> None:
    (prompt,) = prompts_of_rows([Example("¿Qué?", response, code=code)])
    assert prompt.expect == demands


def test_code_of_the_question_is_kept_unless_it_needs_the_answer() -> None:
    question = f"Corrige:\n\n{TS}"
    kept, left = prompts_of_rows(
        [
            Example(question, TS, code=("TS2322", "ok +1")),
            Example(f"Arregla: {TS}".replace(": ", ":\n\n"), TS, code=("TS2322 +2", "ok")),
        ]
    )
    assert (kept.code, kept.expect) == (("TS2322",), {"code": True})
    assert left.code == ()


def test_repeated_question_is_asked_once_in_its_conversation() -> None:
    earlier = ({"role": "user", "content": "¿A?"}, {"role": "assistant", "content": "B."})
    first = Example("¿Y C?", "D.", history=earlier, line=1)
    prompts = prompts_of_rows([first, Example("¿Y C?", "E.", history=earlier, line=2), Example("¿Y C?", "F.", line=3)])
    assert [(prompt.reference, prompt.history, prompt.line) for prompt in prompts] == [
        ("D.", earlier, 1),
        ("F.", (), 3),
    ]
