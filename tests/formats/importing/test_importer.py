"""formats/importing/importer.py, and with it formats/importing/names.py: one file of rows from several, and a list of
what was left out."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows

from tutor.errors import ArtifactError, DataError, RecipeError
from tutor.formats.importing import importer
from tutor.formats.importing.importer import Import, import_files
from tutor.formats.importing.names import Options, read_map

ASK, REPLY = {"role": "user", "content": "¿Qué es?"}, {"role": "assistant", "content": "Un tipo."}
SYSTEM = {"role": "system", "content": 'Sé "breve".'}
PAIR = {"instruction": "¿Qué es?", "response": "Un tipo."}


def imported(folder: Path, *rows: Any, options: Options | None = None, **other: Any) -> tuple[Import, list[Any]]:
    write_rows(folder / "in.jsonl", list(rows))
    result = import_files([folder / "in.jsonl"], folder / "out.jsonl", options or Options(), **other)
    return result, [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]


def test_rows_are_written_and_the_others_kept_with_reasons(tmp_path: Path) -> None:
    bad = {"prompt": "a", "chosen": "b", "rejected": "c"}
    alpaca = {"instruction": "¿Y?", "output": "Sí.", "fuente": "web"}
    result, rows = imported(tmp_path, PAIR, bad, alpaca, {"instruction": "¿Y?", "output": " "})
    assert rows == [PAIR, {"instruction": "¿Y?", "response": "Sí."}]
    left_out = [json.loads(line) for line in (tmp_path / "out.jsonl.left-out.jsonl").read_text("utf-8").splitlines()]
    assert [(each["line"], each["row"]) for each in left_out] == [(2, bad), (4, {"instruction": "¿Y?", "output": " "})]
    assert [each.why for each in result.left_out] == [
        "is a preference pair (chosen, rejected), not an answer to train on",
        "response is empty",
    ]
    counts = result.as_dict()["files"][0]
    assert (counts["taken"], counts["left_out"], counts["dropped_keys"]) == (2, 2, {"fuente": 1})


def test_later_import_without_left_out_rows_removes_their_file(tmp_path: Path) -> None:
    imported(tmp_path, PAIR, {"text": "a"})
    assert (tmp_path / "out.jsonl.left-out.jsonl").exists()
    imported(tmp_path, PAIR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_import_that_fails_leaves_the_earlier_files(tmp_path: Path) -> None:
    imported(tmp_path, PAIR, {"text": "a"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "in.jsonl"}
    with pytest.raises(DataError, match=r"no row can be taken: 2 x is plain text for pre-training") as caught:
        imported(tmp_path, {"text": "a"}, {"text": "b"})
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="1 of 2 rows are left out"):
        imported(tmp_path, PAIR, {"text": "a"}, strict=True)
    (tmp_path / "in.jsonl").write_bytes('{"question": "qué", "answer": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"in.jsonl:1: is not UTF-8 at byte 17 \(0xe9\).*iconv"):
        import_files([tmp_path / "in.jsonl"], tmp_path / "out.jsonl", Options())
    with pytest.raises(RecipeError, match="cannot be opened"):
        import_files([tmp_path / "none.csv"], tmp_path / "out.jsonl", Options())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "in.jsonl"} == before


def test_system_text_of_all_rows_is_reported_and_left_out(tmp_path: Path) -> None:
    result, rows = imported(
        tmp_path, {"messages": [SYSTEM, ASK, REPLY]}, {**PAIR, "system": SYSTEM["content"], "id": 7}
    )
    assert result.system == SYSTEM["content"]
    assert rows == [PAIR, {**PAIR, "id": 7}]


def test_system_texts_that_differ_stay_in_their_rows(tmp_path: Path) -> None:
    result, rows = imported(tmp_path, {"messages": [SYSTEM, ASK, REPLY]}, PAIR)
    assert (result.system, rows) == ("", [{"messages": [SYSTEM, ASK, REPLY]}, PAIR])


def test_link_as_output_keeps_being_a_link(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [PAIR])
    (tmp_path / "target.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target.jsonl")
    import_files([tmp_path / "in.jsonl"], tmp_path / "link", Options())
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target.jsonl").read_text("utf-8")) == PAIR


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = importer._checked

    def change(found: Any, *others: Any) -> Any:
        write_rows(tmp_path / "in.jsonl", [PAIR, PAIR])
        return checked(found, *others)

    monkeypatch.setattr(importer, "_checked", change)
    with pytest.raises(ArtifactError, match="changed while it was read"):
        imported(tmp_path, PAIR)
    assert not (tmp_path / "out.jsonl").exists()


def test_progress_is_logged_after_the_quiet_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tutor")
    monkeypatch.setattr(importer, "CHECK_EVERY", 1)
    imported(tmp_path, PAIR, PAIR)
    assert not caplog.records
    monkeypatch.setattr(importer, "QUIET_SECONDS", -1.0)
    imported(tmp_path, PAIR, PAIR)
    assert [record.getMessage() for record in caplog.records] == [
        "import: in.jsonl: 1 rows read",
        "import: in.jsonl: 2 rows read",
    ]
    assert [hasattr(record, "stage") for record in caplog.records] == [True, False]


def test_map_is_read_with_quoted_names() -> None:
    assert read_map(('question=Pregunta,"answer=La respuesta, larga"', "topic = Tema")) == {
        "question": "Pregunta",
        "answer": "La respuesta, larga",
        "topic": "Tema",
    }
    for texts, message in (
        (("question",), "is not PART=COLUMN"),
        (("ask=a,answer=b",), "PART is one of question, input"),
        (("question=a",), "names no whole row"),
        (("question=a,answer=b,answer=c",), "names answer twice"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_map(texts)
