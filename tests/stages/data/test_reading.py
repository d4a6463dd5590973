"""stages/data/reading.py, and with it formats/rows/jsonl.py, formats/rows/json_values.py, formats/rows/rows.py,
formats/rows/texts.py."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tutor.errors import ArtifactError, DataError, RecipeError, TutorError
from tutor.formats.rows.examples import Example
from tutor.formats.rows.jsonl import Limits, unchanged
from tutor.stages.data import reading

BOM = b"\xef\xbb\xbf"


GOOD: dict[str, Any] = {"instruction": "¿Qué es un tipo?", "response": "Un conjunto de valores."}


OTHER: dict[str, Any] = {"instruction": "¿Y una unión?", "response": "Varios tipos."}


def lines(*rows: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def with_response(value: Any) -> bytes:
    return lines(GOOD, {**OTHER, "response": value})


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path: Path, **options: Any) -> DataError:
    """The DataError of reading a file."""
    with pytest.raises(DataError) as caught:
        reading.read_examples(path, **options)
    assert caught.value.code == 3
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("content", "name"),
    [
        pytest.param(lines(GOOD, OTHER), "rows.jsonl", id="plain"),
        pytest.param(BOM + lines(GOOD, OTHER), "rows.jsonl", id="D01-byte-order-mark"),
        pytest.param(BOM + lines(GOOD) + BOM + lines(OTHER), "rows.jsonl", id="D01-two-files-with-marks-joined"),
        pytest.param(lines(GOOD, OTHER, end="\r\n"), "rows.jsonl", id="D02-CRLF"),
        pytest.param(b"\n" + lines(GOOD) + b" \r\n\n" + lines(OTHER), "rows.jsonl", id="D15-blank-lines"),
        pytest.param(lines(GOOD, OTHER).rstrip(), "rows.jsonl", id="D25-no-final-line-end"),
        pytest.param(gzip.compress(lines(GOOD, OTHER)), "rows.jsonl.gz", id="D26-gzip"),
        pytest.param(gzip.compress(lines(GOOD)) + gzip.compress(lines(OTHER)), "rows.gz", id="D26-two-gzip-members"),
        pytest.param(gzip.compress(lines(GOOD, OTHER)), "rows.jsonl", id="D28-gzip-by-content"),
        pytest.param(json.dumps([GOOD, OTHER], indent=2).encode(), "rows.json", id="D30-array"),
        pytest.param(BOM + json.dumps([GOOD, OTHER]).encode(), "rows.JSON", id="D30-array-with-mark"),
        pytest.param(gzip.compress(json.dumps([GOOD, OTHER]).encode()), "rows.json.gz", id="D30-array-in-gzip"),
        pytest.param(lines(GOOD, OTHER), "rows.json", id="D30-lines-named-json"),
    ],
)
def test_tolerated_form_gives_equal_rows(file: Any, content: bytes, name: str) -> None:
    examples, notes = reading.read_examples(file(content, name))
    assert [(each.instruction, each.response) for each in examples] == [
        (row["instruction"], row["response"]) for row in (GOOD, OTHER)
    ]
    assert notes.rows == 2


def test_tolerated_forms_are_noted_and_plain_files_not(file: Any) -> None:
    odd = {**GOOD, "source": "web", "autor": "x"}
    path = file(gzip.compress(BOM + lines(odd, OTHER, odd) + b"\n\n" + lines({**GOOD, "response": "Otra cosa."})))
    _, notes = reading.read_examples(path)
    assert (notes.byte_order_marks, notes.blank_lines, notes.gzip_unnamed) == (1, 2, True)
    assert notes.dropped_keys == {"source": 2, "autor": 2}
    assert notes.duplicates == ((3, 1),)
    assert notes.conflicts == ((1, 6),)
    assert len(notes.warnings()) == 6
    assert all(text.startswith("rows.jsonl: ") for text in notes.warnings())
    assert json.loads(json.dumps(notes.as_dict())) == notes.as_dict()
    assert reading.read_examples(file(lines(GOOD, OTHER), "plain.jsonl"))[1].warnings() == []


def test_line_numbers_are_of_the_file_in_jsonl_and_arrays(file: Any) -> None:
    examples, _ = reading.read_examples(file(b"\n" + lines(GOOD) + b"\n" + lines(OTHER)))
    assert [each.line for each in examples] == [2, 4]
    array = json.dumps([GOOD, OTHER], indent=1).encode()
    examples, _ = reading.read_examples(file(b"\n" + array, "rows.json"))
    assert [each.line for each in examples] == [3, 7]


def test_texts_are_stripped_at_their_ends_only(file: Any) -> None:
    text = "\n a\n\tb \u2028 c\u00a0d  \n"
    examples, notes = reading.read_examples(file(with_response(text)))
    assert examples[1].response == "a\n\tb \u2028 c\u00a0d"
    assert notes.windows_line_ends == 0


def test_indentation_of_an_answer_is_read_and_a_single_blank_not(file: Any) -> None:
    for text, kept in (("\n    return x;\n", "    return x;"), (" Un tipo.", "Un tipo.")):
        examples, _ = reading.read_examples(file(with_response(text)))
        prompts, _ = reading.read_prompts(file(with_response(text)))
        assert examples[1].response == prompts[1].reference == kept


def test_windows_line_ends_in_a_text_are_read_as_lf(file: Any) -> None:
    examples, notes = reading.read_examples(file(with_response("a\r\n\r\n  b\r\n")))
    assert examples[1].response == "a\n\n  b"
    assert notes.windows_line_ends == 1
    assert notes.warnings() == ["rows.jsonl: line ends of Windows (CRLF) in the texts of 1 rows read as LF"]


def test_absent_labels_are_empty_and_given_ones_kept(file: Any) -> None:
    block = "```ts\nlet x = 1;\n```"
    row = {"id": 7, **GOOD, "response": block, "category": "ejemplo", "topic": "tipos", "code": ["ok"]}
    examples, notes = reading.read_examples(file(lines(row, OTHER)))
    assert examples[0] == Example(GOOD["instruction"], block, "ejemplo", "tipos", ("ok",), 1)
    assert examples[1] == Example(**OTHER, line=2)
    assert notes.dropped_keys == {}


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        pytest.param(lines(GOOD, OTHER, end="\r"), "rows.jsonl", "no LF found, old-Mac line ends", id="D03-CR-only"),
        pytest.param(lines(GOOD).decode().encode("utf-16"), "r.jsonl", "is UTF-16, not UTF-8", id="D04-UTF-16"),
        pytest.param(lines(GOOD).decode().encode("utf-32"), "r.jsonl", "is UTF-32, not UTF-8", id="D04-UTF-32"),
        pytest.param(lines(GOOD).decode().encode("utf-16-le"), "r.jsonl", "is UTF-16LE", id="D04-little-endian"),
        pytest.param(lines(GOOD).decode().encode("utf-16-be"), "r.jsonl", "is UTF-16BE", id="D04-big-endian"),
        pytest.param(json.dumps([GOOD]).encode("utf-16"), "rows.json", "is UTF-16, not UTF-8", id="D04-array"),
        pytest.param(bz2.compress(lines(GOOD)), "rows.jsonl", "is compressed with bzip2", id="bzip2"),
        pytest.param(lzma.compress(lines(GOOD)), "rows.json", "is compressed with xz", id="xz"),
        pytest.param(b"PK\3\4" + bytes(40), "rows.jsonl", "Excel file damaged", id="ZIP"),
        pytest.param(b"PAR1\x15\0\xff", "rows.jsonl", "Parquet file damaged", id="Parquet"),
        pytest.param(b"", "rows.jsonl", "0 rows", id="D13-empty"),
        pytest.param(gzip.compress(b""), "rows.jsonl.gz", "0 rows", id="D13-empty-gzip"),
        pytest.param(b"[]", "rows.json", "0 rows", id="D13-empty-array"),
        pytest.param(b"\n\r\n \n", "rows.jsonl", "0 rows, 3 blank lines", id="D14-only-line-ends"),
        pytest.param(gzip.compress(lines(GOOD))[:-9], "rows.jsonl.gz", "gz damaged", id="D27-cut-gzip"),
        pytest.param(gzip.compress(lines(GOOD)) + b"junk", "rows.jsonl.gz", "gz damaged", id="D27-junk-behind"),
        pytest.param(json.dumps(GOOD, indent=1).encode(), "rows.jsonl", "pretty-printed", id="D30-pretty-object"),
        pytest.param(json.dumps([GOOD], indent=1).encode(), "rows.jsonl", "pretty-printed", id="D30-pretty-array"),
    ],
)
def test_file_of_another_kind_is_refused_by_its_name(file: Any, content: bytes, name: str, expected: str) -> None:
    assert expected in refused(file(content, name)).message


@pytest.mark.parametrize(
    ("content", "command"),
    [
        pytest.param(lines(GOOD).decode().encode("utf-16"), "iconv -f UTF-16 -t UTF-8", id="D04"),
        pytest.param(json.dumps(GOOD, indent=1).encode(), "jq -c", id="D30"),
        pytest.param(lines([GOOD]), "jq -c '.[]'", id="D30-array-in-a-line"),
        pytest.param(lines(GOOD, end="\r") * 2, "tr '\\r' '\\n'", id="D03"),
        pytest.param("año".encode("latin-1"), "iconv -f WINDOWS-1252", id="D05"),
    ],
)
def test_hint_is_a_command_that_repairs_the_file(file: Any, content: bytes, command: str) -> None:
    assert command in (refused(file(content)).hint or "")


def test_gzip_bomb_stops_at_the_limit_with_flat_memory(file: Any) -> None:
    bomb = file(gzip.compress(b"\n" * 50_000_000), "bomb.jsonl.gz")
    endless = file(gzip.compress(b"a" * 50_000_000), "endless.jsonl.gz")
    tracemalloc.start()
    try:
        for path in (bomb, endless):
            fault = refused(path, limits=Limits(max_line_bytes=1000, max_total_bytes=100_000))
            assert "more than 100000 bytes once unpacked" in fault.message
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_plain_file_over_the_limit_is_refused(file: Any, name: str) -> None:
    assert "at most 50 are read" in refused(file(lines(GOOD), name), limits=Limits(max_total_bytes=50)).message
    packed = file(gzip.compress(b"[" + b" " * 10_000), name)
    assert "once unpacked" in refused(packed, limits=Limits(max_total_bytes=1000)).message


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        pytest.param(b'{"instruction": "a\xf1o", "response": "b"}', "is not UTF-8 at byte 19 (0xf1)", id="D05"),
        pytest.param(rb'{"instruction": "a", "response": "a\ud800b"}', "response holds \\ud800", id="D06-surrogate"),
        pytest.param(lines({"instruction": "a"}), "lacks response", id="D07-no-response"),
        pytest.param(lines({"response": "a"}), "lacks instruction", id="D07-no-instruction"),
        pytest.param(lines({**GOOD, "response": 5}), "response is the number 5, not a text", id="D09-number"),
        pytest.param(lines({**GOOD, "response": True}), "response is true, not a text", id="D09-boolean"),
        pytest.param(lines({**GOOD, "topic": 3}), "topic is the number 3, not a text", id="D09-topic"),
        pytest.param(lines({**GOOD, "code": "ok"}), "code is a text, not a list", id="D09-code"),
        pytest.param(lines({**GOOD, "code": [1]}), "code.0 is the number 1, not a text", id="D09-code-entry"),
        pytest.param(lines({**GOOD, "response": None}), "response is null, not a text", id="D11-null"),
        pytest.param(lines({**GOOD, "category": None}), "category is null, not a text", id="D11-category"),
        pytest.param(lines({**GOOD, "response": ["a"]}), "response is a list, not a text", id="D12-list"),
        pytest.param(lines({**GOOD, "response": {"a": 1}}), "response is an object, not a text", id="D12-object"),
        pytest.param(lines({**GOOD, "response": ""}), "response is empty", id="D16-empty-response"),
        pytest.param(lines({**GOOD, "instruction": " \n\u00a0"}), "instruction is empty", id="D16-only-blanks"),
        pytest.param(lines({**GOOD, "response": "\u200b\ufeff"}), "response is empty", id="D16-only-invisible"),
        pytest.param(b'{"instruction": "a", "response": "b", "response": "c"}', "key response twice", id="D19"),
        pytest.param(lines({**GOOD, "response": "a\rb"}), "holds \\r, a control character", id="lone-CR"),
        pytest.param(lines({**GOOD, "response": "\x1b[1mb"}), "holds \\x1b, a control", id="escape-sequence"),
        pytest.param(lines({**GOOD, "instruction": "a\x0b"}), "instruction holds \\x0b", id="control-at-the-end"),
        pytest.param(lines({**GOOD, "instruction": "a\x7fb"}), "holds \\x7f", id="DEL"),
        pytest.param(lines({**GOOD, "category": "a\x85b"}), "category holds \\x85", id="C1-control"),
        pytest.param(lines({**GOOD, "response": "a\0b"}), "response holds \\x00", id="D22-escaped-NUL"),
        pytest.param(b'{"instruction": "a", "response": "\0"}', "holds a raw NUL byte", id="D23-raw-NUL"),
        pytest.param(b'{"instruction": "a", "respon', "is unfinished: file cut?", id="D24-in-a-key"),
        pytest.param(b'{"instruction": "a", "response": "b"', "is unfinished: file cut?", id="D24-at-the-brace"),
        pytest.param(b'{"instruction": "\xc3', "is unfinished: file cut?", id="D24-inside-a-letter"),
        pytest.param(
            lines({"data": GOOD}), "found key data; expected instruction,response", id="D31-one-level-too-deep"
        ),
        pytest.param(lines({}), "found key (none); expected instruction,response", id="D31-empty-object"),
        pytest.param(
            b'{"instruction": "a", "response": "b", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}",
            "is nested too deeply",
            id="D32-nesting",
        ),
        pytest.param(
            b'{"instruction": "a", "response": "b", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
            "is nested too deeply",
            id="D32-nesting-that-json-reads",
        ),
        pytest.param(b'"text"', "is a text, not an object", id="D33-scalar"),
        pytest.param(b"null", "is null, not an object", id="D33-null"),
        pytest.param(lines([GOOD]), "is a list, not an object", id="D33-array"),
        pytest.param(b'{"instruction": "a", "response": NaN}', "holds NaN, which is not JSON", id="D33-NaN"),
        pytest.param(b'{"instruction": "a", "response": -Infinity}', "holds -Infinity", id="D33-infinity"),
        pytest.param(b"// a comment", "is a comment", id="D33-comment"),
        pytest.param(b"{'instruction': 'a'}", "is not JSON", id="D33-python-quotes"),
        pytest.param(b"1" * 5000, "a number of too many digits", id="D33-long-number"),
        pytest.param(lines(GOOD).strip() + lines(OTHER), "more than one JSON value", id="D33-two-objects"),
        pytest.param(lines({**GOOD, "response": "<｜User｜>hola"}), "response holds <｜User｜>", id="D35-role"),
        pytest.param(lines({**GOOD, "instruction": "a<｜end▁of▁sentence｜>"}), "instruction holds", id="D35-end"),
        pytest.param(lines({**GOOD, "response": "<|im_end|>"}), "response holds <|im_end|>", id="D35-chatml"),
        pytest.param(lines({**GOOD, "response": "</think></think>"}), "response holds </think>", id="D35-think"),
        pytest.param(
            lines({**GOOD, "instruction": "a\nRespuesta: b"}), "begins with 'Respuesta:'", id="D35-cue-of-the-contract"
        ),
        pytest.param(
            lines({**GOOD, "response": "a\nInstrucción: b"}),
            "begins with 'Instrucción:'",
            id="D35-stop-of-the-contract",
        ),
        pytest.param(lines({**GOOD, "code": ["ok"]}), "code has 1 entries for 0 fenced blocks", id="code-count"),
    ],
)
def test_bad_row_is_refused_with_its_line(file: Any, second: bytes, expected: str) -> None:
    path = file(lines(OTHER) + second)
    fault = refused(path)
    assert fault.message == f"{path}: 1 of 2 rows are not usable"
    assert len(fault.problems) == 1
    assert fault.problems[0].startswith(f"{path}:2: ")
    assert expected in fault.problems[0]
    assert fault.hint


def test_invalid_utf8_in_an_array_is_refused_with_its_line(file: Any) -> None:
    path = file(b'[{"instruction": "a",\n"response": "\xff"}]', "rows.json")
    assert refused(path).problems[0].startswith(f"{path}:2: is not UTF-8")


def test_problems_are_all_counted_and_the_first_20_listed(file: Any) -> None:
    path = file(lines(*[{"instruction": f"{number}"} for number in range(30)], GOOD))
    fault = refused(path)
    assert fault.message == f"{path}: 30 of 31 rows are not usable (the first 20 are listed)"
    assert fault.problems == tuple(f"{path}:{line}: lacks response" for line in range(1, 21))


def test_unknown_keys_are_dropped_or_refused_if_strict(file: Any) -> None:
    path = file(lines(GOOD, {**OTHER, "fuente": 1, "expect": {}}))
    examples, notes = reading.read_examples(path)
    assert len(examples) == 2
    assert notes.dropped_keys == {"fuente": 1, "expect": 1}
    assert "unknown key expect, fuente; known: id, instruction" in refused(path, strict=True).problems[0]


@pytest.mark.parametrize("key", ["input", "context", "system", "history", "System ", "INPUT"])
def test_key_with_a_part_of_the_question_is_read(file: Any, key: str) -> None:
    fault = refused(file(lines(OTHER, {**GOOD, key: {"role": "user"}})))
    assert f"rows.jsonl:2: {key} is an object, not a" in fault.problems[0]
    if key != "history":
        examples, notes = reading.read_examples(file(lines({**GOOD, key: "¿Y esto?"})))
        assert "¿Y esto?" in (
            examples[0].instruction,
            examples[0].instruction[-8:],
            *map(dict.get, examples[0].history, ["content"]),
        )
        assert "read as JSON Lines; 1 rows as Alpaca (instruction, response)" in notes.warnings()[0]
    for empty in ("", " \n", None, [], {}):
        assert reading.read_examples(file(lines({**GOOD, key: empty})))[1].dropped_keys == {key: 1}


@pytest.mark.parametrize("key", ["Category", "category ", "CODE", "Response"])
def test_key_that_differs_in_case_or_blanks_is_refused(file: Any, key: str) -> None:
    (problem,) = refused(file(lines({**GOOD, key: "x"}))).problems
    assert problem.endswith(f"key {key!r} is written {key.strip().lower()!r}")


def test_unprintable_key_is_escaped_in_notes(file: Any) -> None:
    path = file(rb'{"instruction": "a", "response": "b", "\u001b[2J\ud800": 1}')
    _, notes = reading.read_examples(path)
    assert list(notes.dropped_keys) == [r"\x1b[2J\ud800"]
    json.dumps(notes.as_dict(), ensure_ascii=False).encode()


def test_column_of_numbers_is_refused(file: Any) -> None:
    fault = refused(file(lines(*[{"instruction": n, "response": n} for n in range(3)])))
    assert [problem.count("the number") for problem in fault.problems] == [2, 2, 2]


def test_duplicates_are_kept_once_and_contradictions_listed(file: Any) -> None:
    again = {**GOOD, "response": GOOD["response"] + "\n"}
    shouted = {"instruction": "QUE ES UN TIPO", "response": "Otra respuesta."}
    examples, notes = reading.read_examples(file(lines(GOOD, OTHER, again, shouted)))
    assert [each.line for each in examples] == [1, 2, 4]
    assert notes.duplicates == ((3, 1),)
    assert notes.conflicts == ((1, 4),)


def test_long_line_is_read_up_to_the_limit(file: Any) -> None:
    long = "x" * 2**20
    examples, _ = reading.read_examples(file(with_response(long)))
    assert examples[1].response == long
    path = file(lines(GOOD, {**OTHER, "response": "x" * 12_000_000}, OTHER))
    tracemalloc.start()
    try:
        fault = refused(path)
        assert tracemalloc.get_traced_memory()[1] < 9_000_000
    finally:
        tracemalloc.stop()
    assert fault.message.endswith("1 of 3 rows are not usable")
    assert fault.problems == (f"{path}:2: is longer than 2097152 bytes",)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_line_limit_excludes_the_line_end(file: Any, end: bytes) -> None:
    row = lines(GOOD).strip()
    path = file(row + end)
    assert len(reading.read_examples(path, limits=Limits(max_line_bytes=len(row)))[0]) == 1
    refused(path, limits=Limits(max_line_bytes=len(row) - 1))


def test_line_limit_holds_for_elements_of_an_array(file: Any) -> None:
    path = file(json.dumps([GOOD, OTHER]).encode(), "rows.json")
    assert len(refused(path, limits=Limits(max_line_bytes=20)).problems) == 2


@pytest.mark.parametrize(
    "text", ["[1 2]", "[,]", "[{},]", "[", '[{"a"', "[] []", '[{"instruction": "a", "response": "b"}', "[NaN]", "[[]"]
)
def test_broken_array_is_refused(file: Any, text: str) -> None:
    assert refused(file(text.encode(), "rows.json")).problems


@pytest.mark.slow
def test_wrong_type_in_a_late_row_is_found(file: Any) -> None:
    good = b"".join(b'{"instruction": "%d", "response": "b"}\n' % number for number in range(200_000))
    path = file(good + lines({"instruction": "a", "response": 1}))
    assert refused(path).problems == (f"{path}:200001: response is the number 1, not a text",)


def test_name_of_no_regular_file_is_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    for name, expected in {
        "": "is a folder",
        "missing.jsonl": "No such file",
        "*.jsonl": "no file of that name; patterns are not expanded",
        "a": "is a symbolic link that leads to itself",
        "fifo": "is a pipe or a device",
        "nul\0": "null",
        "n" * 5000: "too long",
    }.items():
        with pytest.raises(RecipeError, match=expected) as caught:
            reading.read_examples(tmp_path / name)
        assert caught.value.code == 2
        assert str(tmp_path) in caught.value.message


def test_file_without_read_permission_is_a_data_error(file: Any) -> None:
    path = file(lines(GOOD))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file (root)")
    assert "Permission denied" in refused(path).message


def test_unreadable_file_is_a_data_error() -> None:
    path = Path("/proc/self/mem")
    if not path.exists():
        pytest.skip("needs Linux: a regular file that root cannot read either")
    assert "cannot be read" in refused(path).message


def test_file_that_changes_while_read_is_refused(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, plain = file(lines(GOOD)), [], Path.open

    def another_writes(self: Path, *given: Any, **named: Any) -> Any:
        handle = plain(self, *given, **named)
        opened.extend([self] if self == path else [])
        if len(opened) == 2:  # the first is hashed, the others are read
            with plain(path, "ab") as other:
                other.write(lines(OTHER))
        return handle

    monkeypatch.setattr(Path, "open", another_writes)
    with pytest.raises(ArtifactError, match="input changed") as caught:
        reading.read_examples(path)
    assert caught.value.code == 5
    assert len(opened) == 4


def test_changed_file_is_reported_before_other_errors(file: Any) -> None:
    def read(path: Path, change: Any) -> None:
        with unchanged(path):
            change(path)
            raise DataError("half a row")

    for change in (lambda path: path.write_bytes(b"x"), lambda path: path.unlink()):
        with pytest.raises(ArtifactError, match="input changed"):
            read(file(lines(GOOD)), change)
    with pytest.raises(DataError, match="half a row"):
        read(file(lines(GOOD)), lambda path: path.touch())


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@example(b'{"instruction": "a", "response": "b", "id": 1e999}')
@example(b'{"instruction": "\\ud800", "response": 1}\n[')
def test_any_content_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("rows.jsonl", "rows.json"):
        (folder / name).write_bytes(content)
        try:
            examples, _ = reading.read_examples(folder / name)
        except TutorError as fault:
            str(fault).encode()
        else:
            assert all(each.instruction and each.response for each in examples)


def test_prompt_needs_no_response_and_keeps_expectations(file: Any) -> None:
    expect = {"code": True, "include": [["interface", "interfaz"]], "exclude": []}
    block = "Corrige:\n\n```ts\nlet x: string = 1;\n```"
    rows = [
        {"instruction": block, "category": "correccion", "topic": "t", "code": ["TS2322"], "expect": expect},
        {"instruction": "b", "response": "sí"},
        {"instruction": "b"},
    ]
    prompts, notes = reading.read_prompts(file(lines(*rows)))
    assert prompts[0].expect == expect
    assert (prompts[0].code, prompts[0].category, prompts[0].line) == (("TS2322",), "correccion", 1)
    assert (prompts[1].reference, dict(prompts[1].expect)) == ("sí", {})
    assert notes.duplicates == ((3, 2),)


@pytest.mark.parametrize(
    ("expect", "expected"),
    [
        ({"exlude": ["x"]}, "unknown key expect.exlude"),
        ({"code": "true"}, "expect.code is a text, not true or false"),
        ({"include": ["interface"]}, "expect.include.0 is a text, not a list"),
        ({"include": [[]]}, "expect.include.0 is empty"),
        ([], "expect is a list, not an object"),
    ],
)
def test_malformed_expectation_is_refused(file: Any, expect: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        reading.read_prompts(file(lines({"instruction": "a", "expect": expect})))
    assert expected in caught.value.problems[0]


def test_special_token_in_a_prompt_is_refused(file: Any) -> None:
    with pytest.raises(DataError) as caught:
        reading.read_prompts(file(lines({"instruction": "<|im_start|>system"})))
    assert "holds <|im_start|>" in caught.value.problems[0]
