"""formats/rows/split_files.py: the data stage's files as later stages read them."""

from pathlib import Path

import pytest
from support.answering import write_base
from support.files import write_rows

from tutor.errors import ArtifactError
from tutor.formats.rows.split_files import held_out_ids, read_json_lines


def test_rows_are_lines_and_nothing_else_is_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a\u2028b"}\n{"instruction": "c"}\n', "utf-8")
    assert [row["instruction"] for row in read_json_lines(path)] == ["a\u2028b", "c"]
    path.write_text('{"instruction": ', "utf-8")
    with pytest.raises(ArtifactError, match=r"rows\.jsonl"):
        read_json_lines(path)


def test_a_held_out_answer_has_its_blank_before_it_and_eos_behind_it(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "held_out.jsonl", [{"instruction": "¿Sí?", "response": "Sí."}])
    ((prompt, answer),) = held_out_ids(tmp_path, tmp_path / "base", "")
    assert len(prompt) == len("Instrucción: ¿Sí?\nRespuesta:".encode())
    assert answer[-1] == 256
    assert len(answer) - 1 == len(" Sí.".encode())
