"""Rows and recipes of any content end every command that reads them as the contract says."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.fuzzing.examples import check, seeds
from support.fuzzing.guard import run
from support.fuzzing.mutations import bytes_of, json_of, lines_of

from tutor.recipe.settings import Recipe

pytestmark = pytest.mark.slow
ROWS = [
    {
        "instruction": f"¿Qué es `Array<{number}>`?",
        "response": f"Un texto.\n\n```ts\nlet x = {number};\n```",
        "category": "a",
    }
    for number in range(6)
]
ROW = {**ROWS[0], "topic": "tipos", "code": ["pass"], "id": 7}
ROW_COMMANDS = (("data", "check"), ("data", "stats"), ("data", "lint"), ("data", "split"))
RECIPE_COMMANDS = (("status",), ("status", "--json"), ("why", "train"), ("data", "split"), ("clean",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with inputs: a recipe of the tiny model, rows and prompts."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "small.toml").write_text('[data]\nheld_out = 0.2\n[base]\nsource = "tiny"\n', "utf-8")
    (inputs / "tutor.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", "utf-8")
    (inputs / "eval.jsonl").write_text('{"instruction": "¿Y la unión?"}\n', "utf-8")
    return tmp_path


def rows_of(random: Random) -> bytes:
    """A file of rows in one of its forms, with one row changed, or the file's bytes."""
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    if random.random() < 0.3:
        return bytes_of(b"\n".join(lines), random)
    if random.random() < 0.2:
        return json_of([*ROWS, ROW], random)
    lines[random.randrange(len(lines))] = json_of(ROW, random)
    return b"\n".join(lines)


def test_rows_of_any_content_are_taken_or_refused(folder):
    for random in seeds(20):
        raw = rows_of(random)
        (folder / "inputs" / "tutor.jsonl").write_bytes(raw)
        shutil.rmtree(folder / "build", ignore_errors=True)
        outcome = run(*random.choice(ROW_COMMANDS), "-r", "small.toml", folder=folder)
        check(outcome, raw, folder)
        assert outcome.code in (0, 3)


CHATS: list[dict[str, Any]] = [
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>b</think>c", "weight": 1}],
        "tools": "",
        "id": 7,
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}], "label": None, "reasoning": "c"},
]
TABLE = 'question,answer,category\n"a\nb",c,d\n"e ""f""",g,h\n"[1]",i;j,k\n'


def imported_of(random: Random) -> tuple[str, bytes]:
    """A file of another format with its name, changed as values or as bytes."""
    if random.random() < 0.4:
        name, delimiter = random.choice((("rows.csv", ","), ("rows.csv", ";"), ("rows.tsv", "\t")))
        return name, bytes_of(TABLE.replace(",", delimiter).encode(), random)
    if random.random() < 0.5:
        return "rows.json", json_of(random.choice((CHATS, {"version": 1, "data": CHATS})), random)
    lines = [json.dumps(row).encode() for row in CHATS]
    lines[random.randrange(len(lines))] = json_of(random.choice(CHATS), random)
    return "rows.jsonl", b"\n".join(lines)


def test_imported_files_of_any_content_are_taken_or_refused(folder):
    for random in seeds(20):
        name, raw = imported_of(random)
        (folder / "inputs" / name).write_bytes(raw)
        outcome = run("data", "import", name, "-o", folder / "build" / "rows.jsonl", "--force", folder=folder)
        (folder / "inputs" / name).unlink()
        check(outcome, raw, folder)
        assert outcome.code in (0, 3)
        if outcome.code == 0:
            assert run("data", "check", folder / "build" / "rows.jsonl", "--no-code", folder=folder).code == 0


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.parquet"])
def test_damaged_binary_tables_are_taken_or_refused(folder, name):
    table = pytest.importorskip("pandas").DataFrame(
        [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    )
    path = folder / "inputs" / name
    table.to_excel(path, index=False) if name.endswith("xlsx") else table.to_parquet(path)
    whole = path.read_bytes()
    for random in seeds(8):
        raw = bytes_of(whole, random)
        path.write_bytes(raw)
        outcome = run("data", "import", name, "-o", folder / "build" / "rows.jsonl", "--force", folder=folder)
        check(outcome, raw, folder)
        assert outcome.code in (0, 2, 3)


def settings() -> list[str]:
    """The lines of a recipe that has every setting."""
    lines, tables = [], []
    for name, value in Recipe().model_dump(mode="json").items():
        if isinstance(value, dict):
            tables += [
                f"[{name}]",
                *(f"{key} = {json.dumps(item)}" for key, item in value.items() if not isinstance(item, dict)),
            ]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return [*lines, *tables]


def test_recipes_of_any_content_are_taken_or_refused(folder):
    lines = [line.replace('"hub:', '"path:') for line in settings()]
    for random in seeds(20):
        raw = lines_of(lines, random)
        (folder / "inputs" / "small.toml").write_bytes(raw)
        shutil.rmtree(folder / "build", ignore_errors=True)
        check(run(*random.choice(RECIPE_COMMANDS), "-r", "small.toml", folder=folder), raw, folder)
