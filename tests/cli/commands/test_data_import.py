"""cli/commands/data_import.py: what `tutor data import` prints, writes and refuses to overwrite."""

import json
from pathlib import Path
from typing import Any

CSV = "Pregunta;Respuesta\n¿Qué es?;Un tipo.\n¿Y?;\n"


def test_import_prints_formats_and_left_out_rows(tutor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV + "c;\n" * 30, "utf-8")
    done = tutor("data", "import", tmp_path / "a.csv", "-o", tmp_path / "rows.jsonl")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"{tmp_path}/a.csv: CSV with semicolons; 32 rows as question/answer (pregunta, respuesta): 1 taken, 31 left out"
    )
    assert lines[1] == f"  {tmp_path}/a.csv:3: response is empty"
    assert lines[21:] == [
        "  ... and 11 more",
        f"{tmp_path}/rows.jsonl: 1 rows",
        f"{tmp_path}/rows.jsonl.left-out.jsonl: the rows that were left out, with the reasons",
    ]
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8")) == {
        "instruction": "¿Qué es?",
        "response": "Un tipo.",
    }
    assert tutor("data", "check", tmp_path / "rows.jsonl", "--no-code").returncode == 0


def test_import_with_json_lists_every_left_out_row(tutor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV + "c;\n" * 30, "utf-8")
    done = tutor("data", "import", tmp_path / "a.csv", "-o", tmp_path / "rows.jsonl", "--json")
    result = json.loads(done.stdout)
    assert (result["rows"], result["left_out"], len(result["rows_left_out"])) == (1, 31, 31)
    done = tutor("data", "import", tmp_path / "a.csv", "-o", tmp_path / "other.jsonl", "--strict", "--json")
    assert done.returncode == 3
    assert len(json.loads(done.stdout)["problems"]) == 31


def test_import_of_no_row_fails_and_lists_twenty(tutor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Érase una vez."}\n' * 30, "utf-8")
    done = tutor("data", "import", tmp_path / "a.jsonl", "-o", tmp_path / "rows.jsonl")
    assert done.returncode == 3
    assert "no row can be taken: 30 x is plain text for pre-training" in done.stderr
    assert len(done.stderr.splitlines()) == 21
    assert not (tmp_path / "rows.jsonl").exists()


def test_import_reports_the_line_for_the_recipe(tutor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b", "system": "Sé \\"breve\\"."}\n', "utf-8")
    done = tutor("data", "import", tmp_path / "a.jsonl", "-o", tmp_path / "rows.jsonl")
    assert done.stdout.splitlines()[-1] == 'system = "Sé \\"breve\\"."'


def test_import_overwrites_only_by_force(tutor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV, "utf-8")
    command = ("data", "import", tmp_path / "a.csv", "-o")
    (tmp_path / "rows.jsonl").write_text("{}", "utf-8")
    for output, reason in ((tmp_path / "a.csv", "an input"), (tmp_path / "rows.jsonl", "exists")):
        done = tutor(*command, output, *(["--force"] if reason == "an input" else []))
        assert (done.returncode, reason in done.stderr, len(done.stderr.splitlines())) == (2, True, 1)
    assert tutor(*command, tmp_path / "none" / "rows.jsonl").returncode == 2
    assert tutor(*command, tmp_path / "rows.jsonl", "--force").returncode == 0
    assert "Un tipo." in (tmp_path / "rows.jsonl").read_text("utf-8")


def test_import_of_a_table_by_map(tutor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uno,dos\n¿Qué es?,Un tipo.\n", "utf-8")
    command = ("data", "import", tmp_path / "a.csv", "-o", tmp_path / "rows.jsonl")
    assert "none has a known name; name the columns" in tutor(*command).stderr
    assert tutor(*command, "--map", "question=uno,answer=dos").returncode == 0
    assert "has no column 'tres'" in tutor(*command, "--map", "question=uno,answer=tres", "--force").stderr
