"""The data stage: what each kind of damaged file gives, leaks, splits, samples, statistics."""

import gzip
import json
import os
import random
import tracemalloc
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tutor.errors import ArtifactError, DataError, RecipeError, TutorError
from tutor.formats.markdown import fence_languages
from tutor.formats.rows.jsonl import Limits, unchanged
from tutor.formats.rows.rows import Example
from tutor.formats.rows.split_files import HELD_OUT, PROMPTS, TRAIN, read_split
from tutor.recipe.settings import DataSettings, Recipe
from tutor.stages.data import reading, splitting
from tutor.stages.data import stage as data
from tutor.stages.data.splitting import normalise

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
    """The error that reading gives; every one says what to do next."""
    with pytest.raises(DataError) as caught:
        reading.read_examples(path, **options)
    assert caught.value.code == 3
    assert str(path) in caught.value.message
    return caught.value


# What is read although it is not ideal


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
def test_a_tolerated_form_gives_the_same_rows(file: Any, content: bytes, name: str) -> None:
    examples, notes = reading.read_examples(file(content, name))
    assert [(each.instruction, each.response) for each in examples] == [
        (row["instruction"], row["response"]) for row in (GOOD, OTHER)
    ]
    assert notes.rows == 2


def test_what_was_tolerated_is_noted_once_and_a_plain_file_has_no_notes(file: Any) -> None:
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


def test_lines_are_those_of_the_file_in_jsonl_and_in_an_array(file: Any) -> None:
    examples, _ = reading.read_examples(file(b"\n" + lines(GOOD) + b"\n" + lines(OTHER)))
    assert [each.line for each in examples] == [2, 4]
    array = json.dumps([GOOD, OTHER], indent=1).encode()
    examples, _ = reading.read_examples(file(b"\n" + array, "rows.json"))
    assert [each.line for each in examples] == [3, 7]


def test_texts_are_stripped_at_their_ends_and_only_there(file: Any) -> None:
    text = "\n a\r\n\tb \u2028 c\u0085d\x0b\x1ce  \n"
    examples, _ = reading.read_examples(file(with_response(text)))
    assert examples[1].response == "a\r\n\tb \u2028 c\u0085d\x0b\x1ce"


def test_absent_labels_are_empty_and_given_ones_are_kept(file: Any) -> None:
    block = "```ts\nlet x = 1;\n```"
    row = {"id": 7, **GOOD, "response": block, "category": "ejemplo", "topic": "tipos", "code": ["ok"]}
    examples, notes = reading.read_examples(file(lines(row, OTHER)))
    assert examples[0] == Example(GOOD["instruction"], block, "ejemplo", "tipos", ("ok",), 1)
    assert examples[1] == Example(**OTHER, line=2)
    assert notes.dropped_keys == {}


# What is refused: the file as a whole


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        pytest.param(lines(GOOD, OTHER, end="\r"), "rows.jsonl", "no LF found, old-Mac line ends", id="D03-CR-only"),
        pytest.param(lines(GOOD).decode().encode("utf-16"), "r.jsonl", "is UTF-16, not UTF-8", id="D04-UTF-16"),
        pytest.param(lines(GOOD).decode().encode("utf-32"), "r.jsonl", "is UTF-32, not UTF-8", id="D04-UTF-32"),
        pytest.param(lines(GOOD).decode().encode("utf-16-le"), "r.jsonl", "is UTF-16LE", id="D04-little-endian"),
        pytest.param(lines(GOOD).decode().encode("utf-16-be"), "r.jsonl", "is UTF-16BE", id="D04-big-endian"),
        pytest.param(json.dumps([GOOD]).encode("utf-16"), "rows.json", "is UTF-16, not UTF-8", id="D04-array"),
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
def test_a_file_of_another_kind_is_named_as_what_it_is(file: Any, content: bytes, name: str, says: str) -> None:
    assert says in refused(file(content, name)).message


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
def test_the_hint_is_a_command_that_puts_it_right(file: Any, content: bytes, command: str) -> None:
    assert command in (refused(file(content)).hint or "")


def test_d29_a_gzip_bomb_stops_at_the_limit_with_flat_memory(file: Any) -> None:
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
def test_d29_a_plain_file_over_the_limit_is_refused_too(file: Any, name: str) -> None:
    assert "at most 50 are read" in refused(file(lines(GOOD), name), limits=Limits(max_total_bytes=50)).message
    packed = file(gzip.compress(b"[" + b" " * 10_000), name)
    assert "once unpacked" in refused(packed, limits=Limits(max_total_bytes=1000)).message


# What is refused: single rows


@pytest.mark.parametrize(
    ("second", "says"),
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
def test_a_bad_row_is_refused_with_its_line(file: Any, second: bytes, says: str) -> None:
    path = file(lines(OTHER) + second)
    fault = refused(path)
    assert fault.message == f"{path}: 1 of 2 rows are not usable"
    assert len(fault.problems) == 1
    assert fault.problems[0].startswith(f"{path}:2: ")
    assert says in fault.problems[0]
    assert fault.hint


def test_d05_names_the_line_and_the_byte_of_an_array_too(file: Any) -> None:
    path = file(b'[{"instruction": "a",\n"response": "\xff"}]', "rows.json")
    assert refused(path).problems[0].startswith(f"{path}:2: is not UTF-8")


def test_d07_all_problems_are_counted_and_the_first_twenty_listed(file: Any) -> None:
    path = file(lines(*[{"instruction": f"{number}"} for number in range(30)], GOOD))
    fault = refused(path)
    assert fault.message == f"{path}: 30 of 31 rows are not usable (the first 20 are listed)"
    assert fault.problems == tuple(f"{path}:{line}: lacks response" for line in range(1, 21))


def test_d08_unknown_keys_are_dropped_with_a_note_and_refused_if_strict(file: Any) -> None:
    path = file(lines(GOOD, {**OTHER, "fuente": 1, "expect": {}}))
    examples, notes = reading.read_examples(path)
    assert len(examples) == 2
    assert notes.dropped_keys == {"fuente": 1, "expect": 1}
    assert "unknown key expect, fuente; known: id, instruction" in refused(path, strict=True).problems[0]


def test_d08_a_hostile_key_cannot_break_a_terminal_or_a_file(file: Any) -> None:
    path = file(rb'{"instruction": "a", "response": "b", "\u001b[2J\ud800": 1}')
    _, notes = reading.read_examples(path)
    assert list(notes.dropped_keys) == [r"\x1b[2J\ud800"]
    json.dumps(notes.as_dict(), ensure_ascii=False).encode()


def test_d10_a_column_of_numbers_is_refused(file: Any) -> None:
    fault = refused(file(lines(*[{"instruction": n, "response": n} for n in range(3)])))
    assert [problem.count("the number") for problem in fault.problems] == [2, 2, 2]


def test_d12_says_that_multi_turn_rows_are_not_supported(file: Any) -> None:
    assert "multi-turn not supported" in (refused(file(with_response([{"role": "user"}]))).hint or "")
    assert "multi-turn not supported" in (refused(file(lines({"messages": []}))).hint or "")


def test_d17_exact_duplicates_are_kept_once_and_contradictions_are_listed(file: Any) -> None:
    again = {**GOOD, "response": GOOD["response"] + "\n"}
    shouted = {"instruction": "QUE ES UN TIPO", "response": "Otra respuesta."}
    examples, notes = reading.read_examples(file(lines(GOOD, OTHER, again, shouted)))
    assert [each.line for each in examples] == [1, 2, 4]
    assert notes.duplicates == ((3, 1),)
    assert notes.conflicts == ((1, 4),)


def test_d20_a_line_of_one_mebibyte_is_read_and_d21_one_over_the_limit_is_not(file: Any) -> None:
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
def test_d21_the_limit_counts_the_row_without_its_line_end(file: Any, end: bytes) -> None:
    row = lines(GOOD).strip()
    path = file(row + end)
    assert len(reading.read_examples(path, limits=Limits(max_line_bytes=len(row)))[0]) == 1
    refused(path, limits=Limits(max_line_bytes=len(row) - 1))


def test_d21_holds_for_an_element_of_an_array(file: Any) -> None:
    path = file(json.dumps([GOOD, OTHER]).encode(), "rows.json")
    assert len(refused(path, limits=Limits(max_line_bytes=20)).problems) == 2


@pytest.mark.parametrize(
    "text", ["[1 2]", "[,]", "[{},]", "[", '[{"a"', "[] []", '[{"instruction": "a", "response": "b"}', "[NaN]", "[[]"]
)
def test_d30_a_broken_array_is_refused(file: Any, text: str) -> None:
    assert refused(file(text.encode(), "rows.json")).problems


@pytest.mark.slow
def test_d34_a_wrong_type_is_found_however_late(file: Any) -> None:
    good = b"".join(b'{"instruction": "%d", "response": "b"}\n' % number for number in range(200_000))
    path = file(good + lines({"instruction": "a", "response": 1}))
    assert refused(path).problems == (f"{path}:200001: response is the number 1, not a text",)


# D36 to D38 need a tokenizer: the label audit of the train stage


def test_d39_a_name_that_is_no_file_is_a_usage_error_and_a_fifo_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    for name, says in {
        "": "is a folder",
        "missing.jsonl": "No such file",
        "*.jsonl": "no file of that name; patterns are not expanded",
        "a": "is a symbolic link that leads to itself",
        "fifo": "is a pipe or a device",
        "nul\0": "null",
        "n" * 5000: "too long",
    }.items():
        with pytest.raises(RecipeError, match=says) as caught:
            reading.read_examples(tmp_path / name)
        assert caught.value.code == 2
        assert str(tmp_path) in caught.value.message


def test_d39_a_file_that_this_user_may_not_read_is_bad_data(file: Any) -> None:
    path = file(lines(GOOD))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file (root)")
    assert "Permission denied" in refused(path).message


def test_d39_a_file_whose_bytes_cannot_be_read_is_bad_data() -> None:
    path = Path("/proc/self/mem")
    if not path.exists():
        pytest.skip("needs Linux: a regular file that root cannot read either")
    assert "cannot be read" in refused(path).message


def test_d40_a_file_that_changes_while_it_is_read_is_not_used(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, plain = file(lines(GOOD)), [], Path.open

    def another_writes(self: Path, *given: Any, **named: Any) -> Any:
        handle = plain(self, *given, **named)
        opened.extend([self] if self == path else [])
        if len(opened) == 2:  # the first is hashed, the second is read
            with plain(path, "ab") as other:
                other.write(lines(OTHER))
        return handle

    monkeypatch.setattr(Path, "open", another_writes)
    with pytest.raises(ArtifactError, match="input changed") as caught:
        reading.read_examples(path)
    assert caught.value.code == 5
    assert len(opened) == 3


def test_d40_comes_before_what_else_is_wrong_with_the_file(file: Any) -> None:
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
def test_no_content_whatever_is_a_bug(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("rows.jsonl", "rows.json"):
        (folder / name).write_bytes(content)
        try:
            examples, _ = reading.read_examples(folder / name)
        except TutorError as fault:
            str(fault).encode()
        else:
            assert all(each.instruction and each.response for each in examples)


# Prompts


def test_a_prompt_needs_no_response_and_keeps_what_its_author_expects(file: Any) -> None:
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
    ("expect", "says"),
    [
        ({"exlude": ["x"]}, "unknown key expect.exlude"),
        ({"code": "true"}, "expect.code is a text, not true or false"),
        ({"include": ["interface"]}, "expect.include.0 is a text, not a list"),
        ({"include": [[]]}, "expect.include.0 is empty"),
        ([], "expect is a list, not an object"),
    ],
)
def test_an_expectation_that_would_never_be_checked_is_refused(file: Any, expect: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        reading.read_prompts(file(lines({"instruction": "a", "expect": expect})))
    assert says in caught.value.problems[0]


def test_d35_holds_for_prompts(file: Any) -> None:
    with pytest.raises(DataError) as caught:
        reading.read_prompts(file(lines({"instruction": "<|im_start|>system"})))
    assert "holds <|im_start|>" in caught.value.problems[0]


# Normal form


def test_what_a_typist_changes_does_not_change_the_normal_form() -> None:
    question = "¿Qué es una «unión», y cómo se escribe?"
    normal = "que es una union y como se escribe"
    assert normalise(question) == normal
    assert normalise("Que es una union y como se escribe") == normal
    assert normalise("  QUÉ ES UNA UNIÓN…\n¡Y cómo se escribe!") == normal
    assert normalise("¿Qué\u200b es una “unión” y cómo\u00a0se escribe?") == normal
    assert normalise("Que es una u\u00adnión y cómo se escribe") == normal
    assert normalise("ﬁle № １") == normalise("file no 1")
    assert normalise("e\u0301xito") == normalise("éxito")


def test_punctuation_counts_where_it_is_the_question() -> None:
    assert normalise("¿Qué hace `?.`?") != normalise("¿Qué hace `??`?")
    assert normalise("```ts\nlet x: T[];\n```") != normalise("```ts\nlet x: T;\n```")
    assert normalise("¿Qué es `keyof`?") == normalise("Que es keyof")
    assert normalise("???") != normalise("!!!")
    assert normalise("कि") != normalise("की")


SPANISH = st.text("aábcñüZÁ ¿?¡!,.«»-\n\t·0 9", max_size=40)


@given(SPANISH)
def test_the_normal_form_is_stable_and_ignores_case_and_ends(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(text.upper()) == normalise(text.lower()) == once
    assert normalise(f"\n¿{text}?  ") == once or not any(sign.isalnum() for sign in text)


@given(st.text())
def test_the_normal_form_is_one_line_and_empty_only_for_blanks(text: str) -> None:
    assert normalise(text).split() == [word for word in normalise(text).split(" ") if word]
    assert bool(normalise(text)) == bool(text.replace("\u0345", "").split())


# Splits and samples

SETS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["definicion", "ejemplo", "correccion", ""]), st.integers(0, 3)),
    min_size=2,
    max_size=60,
)


def examples_of(rows: list[tuple[int, str, int]]) -> list[Example]:
    """One category a question, some questions asked in two ways."""
    category = {question: name for question, name, _ in rows}
    return [
        Example(f"¿Pregunta {question}{'?' * (answer % 2)}", f"r{answer}", category[question], f"t{answer}", (), line)
        for line, (question, _, answer) in enumerate(rows, 1)
    ]


@given(SETS, st.floats(0.01, 0.49), st.integers(0, 2**32 - 1))
def test_a_split_leaks_nothing_keeps_order_and_covers_categories(
    rows: list[tuple[int, str, int]], share: float, seed: int
) -> None:
    examples = examples_of(rows)
    questions = {normalise(each.instruction): each.category for each in examples}
    if len(questions) < 2:
        with pytest.raises(DataError, match="cannot be split"):
            splitting.split(examples, share, seed)
        return
    train, held_out = splitting.split(examples, share, seed)
    assert train
    assert held_out
    assert not {normalise(each.instruction) for each in train} & {normalise(each.instruction) for each in held_out}
    assert sorted([*train, *held_out], key=lambda each: each.line) == examples
    assert [each.line for each in train] == sorted(each.line for each in train)
    for category, count in Counter(questions.values()).items():
        sides = [any(each.category == category for each in side) for side in (train, held_out)]
        assert all(sides) if count > 1 else any(sides)
    assert splitting.split(examples, share, seed) == (train, held_out)


@given(SETS, st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_the_rows(
    rows: list[tuple[int, str, int]], shuffler: random.Random
) -> None:
    examples = examples_of(rows)
    if len({normalise(each.instruction) for each in examples}) < 2:
        return
    shuffled = list(examples)
    shuffler.shuffle(shuffled)
    assert set(splitting.split(examples, 0.2, 1)[1]) == set(splitting.split(shuffled, 0.2, 1)[1])


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(5, 80), min_size=1),
    st.floats(0.05, 0.45),
    st.integers(0, 99),
)
def test_each_category_gives_its_share_within_a_row(sizes: dict[str, int], share: float, seed: int) -> None:
    examples = [Example(f"{name} {n}", "r", name) for name, size in sizes.items() for n in range(size)]
    _, held_out = splitting.split(examples, share, seed)
    found = Counter(each.category for each in held_out)
    for name, size in sizes.items():
        assert abs(found[name] - share * size) <= 1 + 0.5 * size / len(examples)
    assert abs(len(held_out) - share * len(examples)) <= 0.5 + len(sizes)


def test_seeds_give_different_splits_and_the_split_of_a_seed_never_changes() -> None:
    examples = [Example(f"pregunta {n}", "r", "ab"[n % 2]) for n in range(20)]
    held_out = [each.instruction for each in splitting.split(examples, 0.2, 42)[1]]
    assert held_out == ["pregunta 5", "pregunta 6", "pregunta 10", "pregunta 13"]
    assert len({tuple(splitting.split(examples, 0.2, seed)[1]) for seed in range(10)}) > 5


@pytest.mark.parametrize("share", [0.001, 0.99])
def test_neither_side_is_ever_empty(share: float) -> None:
    for examples in (
        [Example(f"pregunta {n}", "r", "a") for n in range(5)],
        [Example(f"pregunta {n}", "r", str(n)) for n in range(5)],
        [Example("pregunta", str(n)) for n in range(5)] + [Example("otra", "r", "b")],
    ):
        assert all(splitting.split(examples, share, 1))


def test_a_split_needs_two_questions() -> None:
    with pytest.raises(DataError, match="2 rows with 1 different questions cannot be split") as caught:
        splitting.split([Example("a", "b"), Example("¿A?", "c")], 0.1, 1)
    assert caught.value.code == 3


@pytest.mark.slow
@given(SETS, st.integers(1, 70), st.integers(0, 99))
def test_a_sample_has_so_many_rows_in_proportion_and_in_order(
    rows: list[tuple[int, str, int]], count: int, seed: int
) -> None:
    examples = examples_of(rows)
    chosen = splitting.sample(examples, count, seed)
    assert len(chosen) == min(count, len(examples))
    assert [each.line for each in chosen] == sorted({each.line for each in chosen})
    assert chosen == splitting.sample(examples, count, seed)
    whole, part = (Counter((each.category, each.topic) for each in side) for side in (examples, chosen))
    for group, size in whole.items():
        assert abs(part[group] - size * len(chosen) / len(examples)) < 1
    whole, part = (Counter(each.category for each in side) for side in (examples, chosen))
    for name, size in whole.items():
        assert abs(part[name] - size * len(chosen) / len(examples)) < 1


def test_a_small_sample_of_a_balanced_set_has_every_category_and_topic() -> None:
    examples = [Example(f"{c}{t}{n}", "r", c, t) for c in "abcde" for t in "uvwxyz" for n in range(4)]
    chosen = splitting.sample(examples, 10, 42)
    assert Counter(each.category for each in chosen) == dict.fromkeys("abcde", 2)
    assert {each.topic for each in chosen} == set("uvwxyz")


def test_a_sample_of_zero_rows_is_all_of_them() -> None:
    examples = [Example(str(n), "r") for n in range(5)]
    assert splitting.sample(examples, 0, 1) == examples


# Statistics


def test_statistics_count_what_is_there() -> None:
    block = "Así:\n\n```TS strict\nlet x = 1;\n```\n\n> ```\n> y\n> ```"
    examples = [
        Example("uno", "12345", "definicion", "tipos"),
        Example("¿Uno?", block, "definicion", "genericos"),
        Example("dos", "1", "ejemplo", "tipos"),
    ]
    found = data.row_statistics(examples)
    assert found["rows"] == 3
    assert (found["questions"], found["repeated_questions"]) == (2, 1)
    assert found["categories"] == {"definicion": 2, "ejemplo": 1}
    assert found["categories_and_topics"] == {"definicion": {"genericos": 1, "tipos": 1}, "ejemplo": {"tipos": 1}}
    assert found["instruction_characters"] == {"min": 3, "median": 3, "p95": 5, "max": 5}
    assert found["response_characters"]["max"] == len(block)
    assert found["fenced_blocks"] == {"": 1, "ts": 1}
    assert found["rows_without_block"] == 2
    assert json.loads(json.dumps(found)) == found
    assert data.row_statistics([])["rows"] == 0


MARKDOWN = ["```", "```ts", "~~~", "````", " ```", "- ```js", "> x", "<div>", "a", "", "\r", "\t```", "- b", "`c`"]


@given(st.lists(st.sampled_from(MARKDOWN), max_size=9).map("\n".join))
@example("<pre>\n```ts\nx\n```\n")
@example("a\r<pre>\n```\nx\n```")
def test_fences_are_those_of_commonmark(text: str) -> None:
    tokens = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    assert fence_languages(text) == [(token.info.split() or [""])[0].lower() for token in tokens]


# The stage


def recipe_in(
    folder: Path, training: list[dict[str, Any]], prompts: list[dict[str, Any]], /, **settings: Any
) -> Recipe:
    (folder / "tutor.jsonl").write_bytes(lines(*training))
    (folder / "eval.jsonl").write_bytes(lines(*prompts))
    return Recipe(data=DataSettings(**settings), path=folder / "tiny.toml")


TRAINING = [
    {"instruction": f"¿Qué es {n}?", "response": f"«{n}»\u2028\x85", "category": "ab"[n % 2]} for n in range(20)
]


def test_the_stage_writes_what_load_split_reads_back(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "¿Y esto?", "expect": {"include": [["año"]]}}])
    summary = data.run(recipe, {}, tmp_path / "out")
    assert (summary["rows"], summary["train"], summary["held_out"], summary["prompts"]) == (20, 18, 2, 1)
    examples, _ = reading.read_examples(tmp_path / "tutor.jsonl")
    expected = (*splitting.split(examples, 0.1, recipe.seed), reading.read_prompts(tmp_path / "eval.jsonl")[0])
    for name, rows in zip((TRAIN, HELD_OUT, PROMPTS), expected, strict=True):
        assert read_split(tmp_path / "out", name) == [{**asdict(row), "code": list(row.code)} for row in rows]
    text = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert text.startswith('{"instruction": "¿Qué es '.encode())
    assert text.count(b"\n") == 18
    assert b"\r" not in text
    assert json.loads(json.dumps(summary)) == summary


def test_a_part_of_the_rows_and_of_the_prompts_is_taken_where_the_recipe_says_so(tmp_path: Path) -> None:
    prompts = [{"instruction": f"p{n}", "category": "ab"[n % 2]} for n in range(8)]
    summary = data.run(recipe_in(tmp_path, TRAINING, prompts, rows=10, prompts=4), {}, tmp_path / "out")
    assert (summary["rows"], summary["train"] + summary["held_out"], summary["prompts"]) == (20, 10, 4)
    train, held_out, asked = (read_split(tmp_path / "out", name) for name in (TRAIN, HELD_OUT, PROMPTS))
    assert Counter(each["category"] for each in [*train, *held_out]) == {"a": 5, "b": 5}
    assert Counter(each["category"] for each in asked) == {"a": 2, "b": 2}


def test_the_same_rows_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data.run(recipe_in(tmp_path / name, TRAINING, [{"instruction": "x"}], rows=10), {}, tmp_path / name / "out")
    for path in (tmp_path / "one" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "out" / path.name).read_bytes()


def test_d18_what_evaluation_asks_is_taken_from_training_and_reported(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "z"}, {"instruction": "QUE ES 7"}])
    summary = data.run(recipe, {}, tmp_path / "out")
    assert (summary["rows"], summary["train"] + summary["held_out"]) == (20, 19)
    assert summary["notes"] == ["tutor.jsonl: 1 rows removed, for eval.jsonl asks them too"]
    report = json.loads((tmp_path / "out" / "statistics.json").read_text("utf-8"))
    assert report["removed_from_train"] == [{"line": 8, "eval_line": 2}]
    rows = [row for name in (TRAIN, HELD_OUT) for row in read_split(tmp_path / "out", name)]
    assert "¿Qué es 7?" not in {row["instruction"] for row in rows}


def test_d18_is_an_error_if_strict_and_when_nothing_is_left(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "que es 7"}])
    with pytest.raises(DataError) as caught:
        data.run(recipe, {}, tmp_path / "out", strict=True)
    assert caught.value.problems == (f"{tmp_path}/tutor.jsonl:8: also {tmp_path}/eval.jsonl:1",)
    with pytest.raises(DataError, match="20 of 20 rows ask what"):
        data.run(recipe_in(tmp_path, TRAINING, TRAINING), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_file_that_the_recipe_names_must_exist(tmp_path: Path, key: str) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "x"}], **{key: "absent.jsonl"})
    for call in (lambda: data.run(recipe, {}, tmp_path / "out"), lambda: data.data_files(recipe)):
        with pytest.raises(RecipeError, match=r"absent\.jsonl"):
            call()


@pytest.mark.parametrize("name", ["loop", "~nobody-of-that-name/rows.jsonl", "a\0b"])
def test_d39_a_path_that_cannot_be_resolved_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RecipeError):
        data.data_files(recipe_in(tmp_path, TRAINING, [{"instruction": "x"}], train=name))


def test_input_files_are_those_of_the_recipe(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TRAINING, [{"instruction": "x"}])
    assert data.data_files(recipe) == {"train": tmp_path / "tutor.jsonl", "eval": tmp_path / "eval.jsonl"}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"line": 1}\n', b"[]\n", b'{"code": 1}\n', b"\xff\n"])
def test_a_damaged_split_is_an_artifact_error(tmp_path: Path, damage: bytes) -> None:
    data.run(recipe_in(tmp_path, TRAINING, [{"instruction": "x"}]), {}, tmp_path / "out")
    path = tmp_path / "out" / "held_out.jsonl"
    if damage:
        path.write_bytes(damage)
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"held_out\.jsonl") as caught:
        read_split(tmp_path / "out", HELD_OUT)
    assert caught.value.code == 5
