"""Read GGUF, llama.cpp's file format, and check every length against the file.

In: a GGUF file. Out: its metadata, and type, shape and position of each tensor. Reads no tensor data, and no array of
numbers before it is used: either may be as long as the file.
`gguf.GGUFReader` is not used: with a wrong array length it visits the whole file item by item and does not end, it
accepts bytes after the last tensor, and it needs seconds for a vocabulary.
"""

import contextlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from tutor.errors import ArtifactError

VERSION = 3
"""Version of the format that is read."""
ALIGNMENT = 32
"""Alignment of tensor data in bytes, where the file names none."""
MAX_DIMENSIONS = 4
"""Maximum number of dimensions of a tensor."""
MAX_FIELDS = 1 << 12
"""Maximum number of metadata values; real files have about 40."""
MAX_TENSORS = 1 << 16
"""Maximum number of tensors; real files have up to a few thousand."""
MAX_TEXTS = 1 << 22
"""Maximum number of texts in all arrays; the largest vocabularies have a quarter of a million tokens."""
MAX_TEXT_BYTES = 1 << 26
"""Maximum size of all texts together in bytes; a vocabulary of 128,256 tokens with its merges has 5 MB."""
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter by the number of a scalar type."""
UINT32 = 4
"""Type number of an unsigned 32-bit value."""
STRING = 8
"""Type number of a text."""
ARRAY = 9
"""Type number of an array."""


@dataclass(frozen=True)
class Tensor:
    """Type, shape and position of one tensor."""

    kind: str  # F16, Q4_K, ...
    shape: tuple[int, ...]  # length of a row first
    start: int = field(default=0, compare=False)  # of its data in the file, in bytes


@dataclass(frozen=True)
class Gguf:
    """Content of a GGUF file without the data of its tensors."""

    fields: Mapping[str, Any]  # metadata: numbers, bools, texts, lists of texts, arrays of numbers
    tensors: Mapping[str, Tensor]


class NumberArray(Sequence[float]):
    """An array of numbers in a file, read when it is used."""

    def __init__(self, path: Path, form: str, start: int, count: int) -> None:
        self._path, self._form, self._start, self._count = path, form, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        import numpy as np

        if not self._count:
            return [][index]
        stored = np.memmap(self._path, np.dtype(f"<{self._form}"), "r", self._start, (self._count,))
        return stored[index].tolist()

    def __iter__(self) -> Iterator[float]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | NumberArray) and len(self) == len(other) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self._count} numbers"


def read_gguf(path: Path, *, vocabulary_only: bool = False) -> Gguf:
    """Read a GGUF file, every length checked against the file; with `vocabulary_only` one without tensors.

    Raises ArtifactError when it is not whole.
    """
    with _cursor(path) as cursor:
        return _read(cursor, vocabulary_only=vocabulary_only)


def read_fields(path: Path) -> dict[str, Any]:
    """Read a GGUF's metadata alone, without the gguf package, which publishing need not have.

    Raises ArtifactError as `read_gguf`.
    """
    with _cursor(path) as cursor:
        return _read_fields(cursor)[0]


@contextlib.contextmanager
def _cursor(path: Path) -> "Iterator[_Cursor]":
    """A cursor at a file's beginning. Raises ArtifactError where what is read of the file is not whole."""
    try:
        with path.open("rb", buffering=1 << 20) as file:
            yield _Cursor(path, file)
    except (OSError, ValueError, struct.error) as error:
        raise ArtifactError(f"{path} is no whole GGUF: {error}", "make it again: tutor convert") from error


class _Cursor:
    """Position in the file. Reads from it onwards, and raises ValueError where the end is nearer than the value's.

    The file is not mapped: a program that cuts a mapped file would end this one with a signal.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._path, self._file = path, file
        self._texts = MAX_TEXTS
        self._text_bytes = MAX_TEXT_BYTES

    def read(self, size: int) -> bytes:
        self._fits(size)
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError("it became shorter while it was read")
        self.at += size
        return data

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{form}", self.read(struct.calcsize("<" + form) * count))

    def text(self) -> str:
        size = self.number("Q")
        self._fits(size)
        self._text_bytes -= size
        if self._text_bytes < 0:
            raise ValueError(f"its texts have more than {MAX_TEXT_BYTES} bytes")
        return self.read(size).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            return self._text_array(count) if item == STRING else self._number_array(_form(item), count)
        return self.number(_form(kind))

    def _text_array(self, count: int) -> list[str]:
        self._fits(8 * count)
        self._texts -= count
        if self._texts < 0:
            raise ValueError(f"its arrays have more than {MAX_TEXTS} texts")
        return [self.text() for _ in range(count)]

    def _number_array(self, form: str, count: int) -> NumberArray:
        size = struct.calcsize("<" + form) * count
        self._fits(size)
        found = NumberArray(self._path, form, self.at, count)
        self.at += size
        self._file.seek(self.at)
        return found

    def _fits(self, size: int) -> None:
        if size > self.size - self.at:
            raise ValueError(f"{size} bytes from byte {self.at} on do not fit into its {self.size}")


def _form(kind: int) -> str:
    if kind not in FORMS:
        raise ValueError(f"unknown type {kind} of a value")
    return FORMS[kind]


def _read_fields(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """Metadata, and the number of tensors whose descriptions follow."""
    if (magic := cursor.read(min(4, cursor.size))) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    version, n_tensors, n_fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version != VERSION:
        raise ValueError(f"version {version}" + (" (big-endian)" if version == VERSION << 24 else ""))
    for count, limit, what in ((n_fields, MAX_FIELDS, "values"), (n_tensors, MAX_TENSORS, "tensors")):
        if count > limit:
            raise ValueError(f"{count} {what}, more than {limit}")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name, kind = cursor.text(), cursor.number("I")
        if not name or name in fields:
            raise ValueError(f"the key {name!r:.80} is empty or there twice")
        fields[name] = cursor.value(kind)
        if name == "general.alignment" and (kind != UINT32 or fields[name].bit_count() != 1):
            raise ValueError(f"an alignment of {fields[name]!r:.80}")
    return fields, n_tensors


def _read(cursor: _Cursor, *, vocabulary_only: bool) -> Gguf:
    fields, n_tensors = _read_fields(cursor)
    tensors: dict[str, Tensor] = {}
    places = []
    for _ in range(n_tensors):
        name, tensor, offset, size = _tensor(cursor)
        if name in tensors:
            raise ValueError(f"the tensor {name!r:.80} is there twice")
        tensors[name] = tensor
        places.append((offset, size, name))
    alignment = fields.get("general.alignment", ALIGNMENT)
    _check_places(places, cursor, alignment, may_be_empty=vocabulary_only)
    start = _aligned(cursor.at, alignment)
    return Gguf(fields, {name: replace(tensors[name], start=start + offset) for offset, _, name in places})


def _tensor(cursor: _Cursor) -> tuple[str, Tensor, int, int]:
    """Name, description, offset and size in bytes."""
    import gguf

    name, n_dimensions = cursor.text(), cursor.number("I")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name!r:.80} has {n_dimensions} dimensions")
    shape = cursor.numbers("Q", n_dimensions)
    kind, offset = gguf.GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
    block, block_size = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[0] % block:
        raise ValueError(f"the tensor {name!r:.80} of {kind.name} has the shape {list(shape)}")
    return name, Tensor(kind.name, shape), offset, math.prod(shape) // block * block_size


def _check_places(places: list[tuple[int, int, str]], cursor: _Cursor, alignment: int, *, may_be_empty: bool) -> None:
    """Raise ValueError unless the tensors follow one another, each aligned, and the last one ends the file."""
    if not places and may_be_empty:
        return
    if not places:
        raise ValueError("it holds no tensor")
    start = end = _aligned(cursor.at, alignment)
    for offset, size, name in sorted(places):
        if start + offset != _aligned(end, alignment):
            raise ValueError(
                f"the tensor {name!r:.80} is at byte {start + offset} instead of {_aligned(end, alignment)}"
            )
        end = start + offset + size
    if cursor.size not in (end, _aligned(end, alignment)):
        raise ValueError(f"it has {cursor.size} bytes instead of {_aligned(end, alignment)}")


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
