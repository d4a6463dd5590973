"""formats/rows/split_files.py and row_ids.py: reading the files of the data stage."""

from pathlib import Path

import pytest
from support.fakes.llamacpp_answers import write_base
from support.files import write_rows

from tutor.errors import ArtifactError
from tutor.formats.rows.row_ids import held_out_ids
from tutor.formats.rows.split_files import HELD_OUT, read_json_lines, read_split
from tutor.recipe.settings import Recipe


def test_json_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a\u2028b"}\n{"instruction": "c"}\n', "utf-8")
    assert [row["instruction"] for row in read_json_lines(path)] == ["a\u2028b", "c"]
    path.write_text('{"instruction": ', "utf-8")
    with pytest.raises(ArtifactError, match=r"rows\.jsonl"):
        read_json_lines(path)


def test_held_out_answer_ids_begin_with_blank_end_with_eos(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "held_out.jsonl", [{"instruction": "¿Sí?", "response": "Sí."}])
    ((prompt, answer),) = held_out_ids(Recipe(), tmp_path, tmp_path / "base")
    assert len(prompt) == len("Instrucción: ¿Sí?\nRespuesta:".encode())
    assert answer[-1] == 256
    assert len(answer) - 1 == len(" Sí.".encode())


@pytest.mark.parametrize("damage", [b"", b"{", b'{"line": 1}\n', b"[]\n", b'{"code": 1}\n', b"\xff\n"])
def test_damaged_split_file_raises_artifact_error(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / HELD_OUT
    write_rows(path, [{"instruction": "¿Sí?", "response": "Sí."}])
    assert len(read_split(tmp_path, HELD_OUT)) == 1
    if damage:
        path.write_bytes(damage)
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"held_out\.jsonl") as caught:
        read_split(tmp_path, HELD_OUT)
    assert caught.value.code == 5
