"""formats/importing/reading.py, and with it formats/importing/json_lists.py, formats/importing/delimited.py,
formats/importing/table_rows.py, formats/importing/spreadsheets.py, formats/importing/tables.py,
formats/importing/dataset_folders.py."""

import gzip
import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutor.errors import DataError, RecipeError
from tutor.formats.importing.dataset_folders import read_dataset_folder
from tutor.formats.importing.names import Options, Recognised
from tutor.formats.importing.reading import open_rows
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import Limits, read_values
from tutor.stages.data import reading

PAIRS = [{"instruction": "¿Qué es?", "response": "Un tipo."}, {"instruction": "¿Y a,b?", "response": 'Dice "a";\nb.'}]
CSV = 'question,answer\n¿Qué es?,Un tipo.\n"¿Y a,b?","Dice ""a"";\nb."\n'
SEMICOLONS = 'Pregunta;Respuesta;\r\n¿Qué es?;Un tipo.;\r\n¿Y a,b?;"Dice ""a"";\r\nb.";\r\n'
CHATS = [{"conversations": [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["response"]}]}
         for row in PAIRS]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(path: Path, options: Options | None = None, limits: Limits | None = None) -> tuple[list[Any], Recognised]:
    """Rows of a file with their lines, errors as texts."""
    recognised = Recognised()
    found = open_rows(path, limits or Limits(), Counter(), options or Options(), recognised)
    return [(line, str(row) if isinstance(row, RowError) else row) for line, row in found], recognised


@pytest.mark.parametrize(
    ("name", "content", "lines", "container"),
    [
        pytest.param("a.jsonl", "".join(json.dumps(row) + "\n" for row in CHATS), [1, 2], "JSON Lines", id="lines"),
        pytest.param("a.json", json.dumps(CHATS, indent=1), [2, 14], "JSON", id="array"),
        pytest.param("a.json", json.dumps({"v": [1], "rows": CHATS, "n": 2}), [1, 1], "JSON, the list rows", id="list"),
        pytest.param("a.json", "".join(json.dumps(row) + "\n" for row in CHATS), [1, 2], "JSON Lines", id="lines-json"),
        pytest.param("a.csv", CSV, [2, 3], "CSV with commas", id="CSV"),
        pytest.param("a.CSV", "\ufeff" + CSV, [2, 3], "CSV with commas", id="CSV-with-mark"),
        pytest.param("a.csv.gz", gzip.compress(CSV.encode()), [2, 3], "CSV with commas", id="CSV-gzip"),
        pytest.param("a.csv", SEMICOLONS, [2, 3], "CSV with semicolons", id="CSV-of-a-Spanish-Excel"),
        pytest.param("a.csv", "sep=;\r\n" + SEMICOLONS, [3, 4], "CSV with semicolons", id="CSV-marked"),
        pytest.param("a.tsv", "Prompt\tCompletion\n¿Qué es?\tUn tipo.\n\n¿Y a,b?\t\"Dice \"\"a\"\";\nb.\"\n", [2, 4],
                     "TSV with tabs", id="TSV"),
    ],
)  # fmt: skip
def test_text_file_of_each_kind_is_read(file: Any, name: str, content: Any, lines: list[int], container: str) -> None:
    rows, recognised = read(file(name, content))
    assert rows == list(zip(lines, PAIRS, strict=True))
    assert recognised.container == container


def test_own_rows_come_out_as_read_values_gives_them(file: Any) -> None:
    rows = [*PAIRS, {"instruction": "sin respuesta"}, {**PAIRS[0], "code": ["pass"], "fuente": "web"}, 7]
    path = file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    assert read(path)[0][:-1] == list(read_values(path, Limits(), Counter()))[:-1]
    assert "is not JSON" in read(path)[0][-1][1]


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ("question,answer\na,b\nc\nd,e\n", 3, "has 1 fields, the first line 2"),
        ("question,answer\na,b,c\n", 2, "has 3 fields, the first line 2"),
        ('question,answer\n"a"b,c\n', 2, "is no CSV: ',' expected after '\"'"),
        ('question,answer\na,b\nc,"d\n', 3, "is no CSV: unexpected end of data"),
    ],
)
def test_record_of_csv_that_is_wrong_has_its_line(file: Any, text: str, line: int, fault: str) -> None:
    assert [(number, row[: len(fault)]) for number, row in read(file("a.csv", text))[0] if isinstance(row, str)] == [
        (line, fault)
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\nqué,b\n".encode("latin-1"), r"a.csv:2: is not UTF-8 at byte 19 \(0xe9\); .*Excel"),
        ("a.csv", CSV.encode("utf-16"), "is UTF-16, not UTF-8; iconv -f UTF-16"),
        ("a.csv", "uno,dos\n1,2\n", "a.csv:1: found the columns uno, dos; none has a known name; .*--map"),
        ("a.csv", "question,question\n1,2\n", "two columns are named question"),
        ("a.csv", "question,answer\ra,b\r", "is no CSV: new-line .*old Mac"),
        ("a.csv", gzip.compress(CSV.encode())[:-9], "gz damaged"),
        ("a.xlsx", b"PK\3\4" + bytes(40), "Excel file damaged"),
        ("a.parquet", b"PAR1\x15\0\xff", "Parquet file damaged"),
        ("a.xls", b"\xd0\xcf\x11\xe0" + bytes(40), "old or encrypted Excel file; save it as .xlsx"),
    ],
)  # fmt: skip
def test_file_that_is_wrong_as_a_whole_is_refused(file: Any, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(file(name, content))
    assert re.search(message, str(caught.value)), str(caught.value)


def test_json_object_with_two_lists_is_refused_at_the_second(file: Any) -> None:
    path = file("a.json", json.dumps({"train": CHATS, "test": CHATS}))
    assert [row if isinstance(row, str) else "row" for _, row in read(path)[0]] == [
        "row",
        "row",
        "the file has two lists, train and test",
    ]


def test_long_csv_is_read_in_flat_memory(file: Any) -> None:
    path = file("a.csv", "question,answer\n" + f"¿Qué es?,{'x' * 500}\n" * 5000)
    tracemalloc.start()
    count = sum(1 for _ in open_rows(path, Limits(), Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (count, peak < 1_500_000) == (5000, True)


def test_quote_that_does_not_close_ends_at_the_limit(file: Any) -> None:
    path = file("a.csv", 'question,answer\n"a,b\n' + "c,d\n" * 5000)
    assert "field larger than field limit" in read(path, limits=Limits(max_line_bytes=1000))[0][0][1]


def write_sheets(path: Path, **sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_sheet_of_excel_is_read_with_its_row_numbers(tmp_path: Path) -> None:
    rows = [["Pregunta", "Respuesta", "Tema"], ["¿Qué es?", "Un tipo.", None], [None, None, None], ["¿2+2?", 4.0, "x"]]
    rows += [["a", "#REF!", ""], ["a", "b" * 32_767, ""]]
    found, recognised = read(write_sheets(tmp_path / "a.xlsx", Hoja1=rows, Hoja2=[]))
    assert found[:2] == [(2, PAIRS[0]), (4, {"instruction": "¿2+2?", "response": "4", "topic": "x"})]
    assert [(line, fault[:25]) for line, fault in found[2:]] == [
        (5, "Respuesta is #REF!, the e"),
        (6, "Respuesta has 32767 chara"),
    ]
    assert recognised.container == "Excel, sheet Hoja1"


def test_one_of_two_sheets_is_named(tmp_path: Path) -> None:
    path = write_sheets(tmp_path / "a.xlsx", uno=[["question", "answer"], ["a", "b"]], dos=[["notas"], ["c"]])
    with pytest.raises(DataError, match="2 sheets with rows: uno, dos"):
        read(path)
    assert read(path, Options(sheet="uno"))[0] == [(2, {"instruction": "a", "response": "b"})]
    with pytest.raises(DataError, match="no sheet 'tres'"):
        read(path, Options(sheet="tres"))


def test_parquet_is_read_with_nested_messages(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    asked = {"role": "user", "content": "¿Qué es?", "tool_calls": None}
    rows = [{"messages": [asked, {"role": "assistant", "content": "Un tipo."}]}, {"messages": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    found, recognised = read(tmp_path / "chat.parquet")
    assert found == [(1, PAIRS[0]), (2, "messages is null, not a list of messages")]
    assert recognised.container == "Parquet"


def test_folder_of_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": row["instruction"], "answer": row["response"]} for row in PAIRS]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    recognised = Recognised()
    assert list(read_dataset_folder(tmp_path / "saved" / "train", Limits(), recognised)) == list(enumerate(rows, 1))
    assert recognised.container == "a datasets folder"
    for folder, message in ((tmp_path / "saved", "several splits: train"), (tmp_path, "did not make")):
        with pytest.raises(RecipeError, match=message):
            list(read_dataset_folder(folder, Limits(), recognised))
    (tmp_path / "saved" / "train" / "state.json").write_text("{}", "utf-8")
    with pytest.raises(DataError, match="damaged"):
        list(read_dataset_folder(tmp_path / "saved" / "train", Limits(), recognised))


def test_tables_are_read_as_rows_and_as_prompts(file: Any) -> None:
    examples, notes = reading.read_examples(file("rows.csv", "Pregunta;Respuesta\n¿A?;B.\n"))
    assert [(row.instruction, row.response, row.line) for row in examples] == [("¿A?", "B.", 2)]
    assert notes.warnings() == [
        "rows.csv: read as CSV with semicolons; 1 rows as question/answer (pregunta, respuesta)"
    ]
    asked = file("prompts.csv", "question,category\n¿A?,tipos\n¿B?,\n")
    prompts, _ = reading.read_prompts(asked)
    assert [(row.instruction, row.category, row.line) for row in prompts] == [("¿A?", "tipos", 2), ("¿B?", "", 3)]
    with pytest.raises(DataError) as caught:
        reading.read_examples(asked)
    assert caught.value.problems[0].endswith(
        "2: found key question, category; expected instruction,response or the keys of another known format"
    )
