"""formats/rows/json_array.py and jsonl.py: arrays that are read element by element, with flat memory."""

import contextlib
import gzip
import io
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutor.errors import DataError
from tutor.formats.rows.json_array import CHUNK, ArrayReader
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import Limits, read_values


def elements(content: bytes, most: int = 7, max_bytes: int = 10_000) -> list[tuple[int, Any]]:
    """The elements of an array that comes in pieces of at most `most` bytes; an error as its text."""
    stream = io.BytesIO(content)
    reader = ArrayReader(lambda size: stream.read(min(size, most)))
    assert reader.next_sign() == "["
    reader.skip()
    return [(line, str(each) if isinstance(each, RowError) else each) for line, each in reader.elements(max_bytes)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1]), st.integers(1, 9), st.booleans())
def test_elements_are_those_of_json_in_any_pieces(values: Any, indent: Any, most: int, escaped: bool) -> None:  # noqa: FBT001
    content = json.dumps(values, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert [each for _, each in elements(content, most)] == values


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_lines_and_columns_are_those_of_the_file(most: int) -> None:
    found = elements(b'\n[1,\n\n {"a":\n 2}\n,"x", tru]', most)
    assert found == [(2, 1), (4, {"a": 2}), (6, "x"), (6, "is not JSON: Expecting value at column 7")]


@pytest.mark.parametrize("most", [1, 1000])
def test_bytes_that_are_no_utf8_are_located_in_the_file(most: int) -> None:
    assert elements('["é",\n"ñ\n'.encode() + b'\xff"]', most) == [(1, "é"), (3, "is not UTF-8 at byte 12 (0xff)")]
    assert elements(b'["\xc3', most) == [(1, "is not UTF-8 at byte 3 (0xc3)")]


def test_long_element_is_an_error_and_the_next_one_is_read() -> None:
    content = json.dumps(["a" * 30, "b", "ñ" * 12], ensure_ascii=False).encode()
    assert elements(content, 1000, max_bytes=25) == [
        (1, "is longer than 25 bytes"),
        (1, "b"),
        (1, "is longer than 25 bytes"),
    ]


def test_endless_element_is_read_up_to_the_limit() -> None:
    read = 0

    def endless(size: int) -> bytes:
        nonlocal read
        read += size
        return (b'["' if read == size else b"") + b"a" * (size - 2)

    reader = ArrayReader(endless)
    reader.next_sign()
    reader.skip()
    assert [str(each) for _, each in reader.elements(10 * CHUNK)] == [f"is longer than {10 * CHUNK} bytes"]
    assert read <= 40 * CHUNK


@pytest.fixture
def peak() -> Iterator[Any]:
    """Function that returns the highest number of bytes in use since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


BOMBS = {
    "blanks": b"[" + b" " * 30_000_000,
    "blanks before": b" " * 30_000_000,
    "blanks between": b"[1" + b"\n" * 30_000_000,
    "a text": b'[{"instruction": "' + b"a" * 30_000_000,
    "texts": b"[" + (b'"' + b"x" * 997 + b'",') * 30_000,
    "nesting": b"[" + b"[" * 30_000_000,
    "no array": b"{" * 30_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_gzip_bomb_of_an_array_ends_with_flat_memory(name: str, tmp_path: Path, peak: Any) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(BOMBS[name], 1))
    limits = Limits(max_line_bytes=100_000, max_total_bytes=20_000_000)
    before = peak()
    with contextlib.suppress(DataError):
        faults = [each for _, each in read_values(path, limits, Counter()) if isinstance(each, RowError)]
        assert len(faults) == 1
    assert peak() - before < 3_000_000
