"""formats/models/gguf.py: reading of whole, damaged and truncated GGUF files."""

import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
from support.models.gguf_bytes import ARCHITECTURE, field, tensor, text, whole

from tutor.errors import ArtifactError
from tutor.formats.models import gguf
from tutor.formats.models.gguf import Tensor, read_fields, read_gguf


def test_whole_file_is_read(tmp_path: Path) -> None:
    numbers = field("n", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3))
    words = field("w", 9, struct.pack("<IQ", 8, 2) + text("año") + text(""))
    flag, ratio = field("f", 7, b"\1"), field("r", 6, struct.pack("<f", 0.5))
    (tmp_path / "a.gguf").write_bytes(whole((ARCHITECTURE, numbers, words, flag, ratio)))
    read = read_gguf(tmp_path / "a.gguf")
    assert read.fields == {"general.architecture": "llama", "n": [1, -2, 3], "w": ["año", ""], "f": True, "r": 0.5}
    assert read.tensors == {"a": Tensor("F32", (8,))}


def test_unpadded_end_and_other_alignment_are_read(tmp_path: Path) -> None:
    two = (tensor("a", (3,)), tensor("b", (3,), offset=64))
    alignment = field("general.alignment", 4, struct.pack("<I", 64))
    (tmp_path / "a.gguf").write_bytes(whole((alignment,), two, b"\0" * 64 + b"\0" * 12, alignment=64))
    assert list(read_gguf(tmp_path / "a.gguf").tensors) == ["a", "b"]


HUGE = 1 << 62


DAMAGED = {
    "empty": b"",
    "magic only": b"GGUF",
    "web page": b"<!DOCTYPE html><html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 0": whole(head=b"GGUF" + struct.pack("<I", 0)),
    "version 1": whole(head=b"GGUF" + struct.pack("<I", 1)),
    "version 99": whole(head=b"GGUF" + struct.pack("<I", 99)),
    "huge tensor count": b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
    "huge key count": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "no tensors": whole(tensors=(), data=b""),
    "string beyond the end": whole((struct.pack("<Q", HUGE) + b"a",)),
    "string of another encoding": whole((field("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"),)),
    "huge array of numbers": whole((field("a", 9, struct.pack("<IQ", 5, 1 << 40)),)),
    "huge array of strings": whole((field("a", 9, struct.pack("<IQ", 8, 1 << 40)),)),
    "more texts than the limit": whole((field("a", 9, struct.pack("<IQ", 8, 5) + 5 * text("")),)),
    "texts longer than the limit": whole((field("a", 8, text(70 * "x")), field("b", 8, text(70 * "x")))),
    "more values than the limit": whole(tuple(field(str(number), 0, b"1") for number in range(9))),
    "more tensors than the limit": whole(tensors=tuple(tensor(str(number)) for number in range(9))),
    "array in an array": whole((field("a", 9, struct.pack("<IQ", 9, 1)),)),
    "unknown type": whole((field("a", 77, b""),)),
    "empty key": whole((field("", 4, b"\0" * 4),)),
    "key twice": whole((ARCHITECTURE, ARCHITECTURE)),
    "tensor twice": whole(tensors=(tensor(), tensor(offset=32)), data=b"\1" * 64),
    "no dimension": whole(tensors=(tensor(shape=()),)),
    "five dimensions": whole(tensors=(tensor(shape=(8, 1, 1, 1, 1)),)),
    "zero dimension": whole(tensors=(tensor(shape=(8, 0)),)),
    "negative dimension": whole(tensors=(tensor(shape=((1 << 64) - 8,)),)),
    "product that wraps around": whole(tensors=(tensor(shape=(1 << 32, 1 << 32, 2)),)),
    "unknown tensor type": whole(tensors=(tensor(kind=4),)),
    "row that is no multiple of its block": whole(tensors=(tensor(shape=(33,), kind=8),)),
    "alignment 0": whole((field("general.alignment", 4, struct.pack("<I", 0)),)),
    "alignment 3": whole((field("general.alignment", 4, struct.pack("<I", 3)),)),
    "alignment of a signed type": whole((field("general.alignment", 5, struct.pack("<i", 32)),)),
    "alignment of text": whole((field("general.alignment", 8, text("32")),)),
    "offset beyond the end": whole(tensors=(tensor(offset=1 << 40),)),
    "offset before its neighbour's end": whole(tensors=(tensor("a"), tensor("b")), data=b"\1" * 64),
    "offset that is not aligned": whole(tensors=(tensor(offset=1),)),
    "last bytes cut": whole()[:-16],
    "half": whole()[: len(whole()) // 2],
    "junk behind": whole() + b"\0" * 32,
}


LIMITS = {"MAX_TEXTS": 4, "MAX_TEXT_BYTES": 120, "MAX_FIELDS": 8, "MAX_TENSORS": 8}
"""Limits of these tests; the files above that have other faults stay below them."""


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.timeout(5)
def test_damaged_file_raises_artifact_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if "the limit" in fault:
        for name, value in LIMITS.items():
            monkeypatch.setattr(gguf, name, value)
    (tmp_path / "a.gguf").write_bytes(DAMAGED[fault])
    with pytest.raises(ArtifactError, match=r"a\.gguf is no whole GGUF: .") as raised:
        read_gguf(tmp_path / "a.gguf")
    assert raised.value.code == 5
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


def test_array_of_numbers_takes_no_memory_until_used(tmp_path: Path) -> None:
    """The array is three times as large as this machine's memory may be: a sparse file."""
    path, count = tmp_path / "a.gguf", 3 << 30
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + field("n", 9, struct.pack("<IQ", 1, count)))
        file.seek(count - 1, 1)
        file.write(b"\x85" + tensor())
        file.write(b"\0" * (-file.tell() % 32 + 32))
    tracemalloc.start()
    try:
        numbers = read_gguf(path).fields["n"]
        assert (len(numbers), numbers[-1], numbers[:2], str(numbers)) == (count, -123, [0, 0], f"{count} numbers")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_empty_array_of_numbers_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(whole((field("n", 9, struct.pack("<IQ", 5, 0)),)))
    assert read_gguf(tmp_path / "a.gguf").fields == {"n": []}


def test_file_truncated_anywhere_raises_artifact_error(tmp_path: Path) -> None:
    content = whole((ARCHITECTURE, field("n", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3))))
    for size in range(len(content)):
        (tmp_path / "a.gguf").write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            read_gguf(tmp_path / "a.gguf")


def test_missing_file_raises_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_gguf(tmp_path / "a.gguf")


def test_metadata_is_read_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that publishes has no gguf package."""
    path = tmp_path / "a.gguf"
    path.write_bytes(whole())
    expected = read_gguf(path).fields
    assert expected
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert read_fields(path) == expected
    path.write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match="no whole GGUF"):
        read_fields(path)
