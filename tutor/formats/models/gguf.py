"""Read GGUF, llama.cpp's file format, and check every length against the file.

In: a GGUF file. Out: its metadata, and type, shape and position of each tensor. Reads no tensor data.
`gguf.GGUFReader` is not used: with a wrong array length it visits the whole file item by item and does not end, it
accepts bytes after the last tensor, and it needs seconds for a vocabulary.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError

VERSION = 3
"""Version of the format that is read."""
ALIGNMENT = 32
"""Alignment of tensor data in bytes, where the file names none."""
MAX_DIMENSIONS = 4
"""Maximum number of dimensions of a tensor."""
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

    fields: Mapping[str, Any]  # metadata: numbers, bools, strings, and lists of them
    tensors: Mapping[str, Tensor]


def read_gguf(path: Path) -> Gguf:
    """Read a GGUF file, every length checked against the file. Raises ArtifactError when it is not whole."""
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data))
    except (OSError, ValueError, struct.error) as error:
        raise ArtifactError(f"{path} is no whole GGUF: {error}", "make it again: tutor convert") from error


class _Cursor:
    """Position in the file. Reads from it onwards, and raises ValueError where the end is nearer than the value's."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form) * count
        self._fits(size)
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += size
        return values

    def text(self) -> str:
        size = self.number("Q")
        self._fits(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item == STRING:
                self._fits(8 * count)
                return [self.text() for _ in range(count)]
            return list(self.numbers(_form(item), count))
        return self.number(_form(kind))

    def _fits(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes from byte {self.at} on do not fit into its {len(self.data)}")


def _form(kind: int) -> str:
    if kind not in FORMS:
        raise ValueError(f"unknown type {kind} of a value")
    return FORMS[kind]


def _read(cursor: _Cursor) -> Gguf:
    if cursor.data[:4] != b"GGUF":
        raise ValueError(f"it begins with {cursor.data[:4]!r}")
    cursor.at = 4
    version, n_tensors, n_fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version != VERSION:
        raise ValueError(f"version {version}" + (" (big-endian)" if version == VERSION << 24 else ""))
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name, kind = cursor.text(), cursor.number("I")
        if not name or name in fields:
            raise ValueError(f"the key {name!r} is empty or there twice")
        fields[name] = cursor.value(kind)
        if name == "general.alignment" and (kind != UINT32 or fields[name].bit_count() != 1):
            raise ValueError(f"an alignment of {fields[name]}")
    tensors: dict[str, Tensor] = {}
    places = []
    for _ in range(n_tensors):
        name, tensor, offset, size = _tensor(cursor)
        if name in tensors:
            raise ValueError(f"the tensor {name!r} is there twice")
        tensors[name] = tensor
        places.append((offset, size, name))
    alignment = fields.get("general.alignment", ALIGNMENT)
    _check_places(places, cursor, alignment)
    start = _aligned(cursor.at, alignment)
    return Gguf(fields, {name: replace(tensors[name], start=start + offset) for offset, _, name in places})


def _tensor(cursor: _Cursor) -> tuple[str, Tensor, int, int]:
    """Name, description, offset and size in bytes."""
    import gguf

    name, n_dimensions = cursor.text(), cursor.number("I")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {n_dimensions} dimensions")
    shape = cursor.numbers("Q", n_dimensions)
    kind, offset = gguf.GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
    block, block_size = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[0] % block:
        raise ValueError(f"the tensor {name!r} of {kind.name} has the shape {list(shape)}")
    return name, Tensor(kind.name, shape), offset, math.prod(shape) // block * block_size


def _check_places(places: list[tuple[int, int, str]], cursor: _Cursor, alignment: int) -> None:
    """Raise ValueError unless the tensors follow one another, each aligned, and the last one ends the file."""
    if not places:
        raise ValueError("it holds no tensor")
    start = end = _aligned(cursor.at, alignment)
    for offset, size, name in sorted(places):
        if start + offset != _aligned(end, alignment):
            raise ValueError(f"the tensor {name!r} is at byte {start + offset} instead of {_aligned(end, alignment)}")
        end = start + offset + size
    if len(cursor.data) not in (end, _aligned(end, alignment)):
        raise ValueError(f"it has {len(cursor.data)} bytes instead of {_aligned(end, alignment)}")


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
