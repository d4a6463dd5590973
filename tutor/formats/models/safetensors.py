"""safetensors files as streams: where each tensor lies, its content piece by piece, a file written while it is hashed.

In: files that are whole (modelfolder.refuse). Out: numpy arrays of bits, and files. Nothing is mapped into memory, so
that a process is as large as the piece it works on. Knows nothing of what the numbers mean, and needs no torch.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import WEIGHTS

WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes a number takes, by safetensors' name of the types that a 16-bit model may hold."""
PIECE = 1 << 20
"""Numbers in a piece, about: it stays in the processor's cache from reading to writing."""
BLOCK = 64
"""Rows of a piece are a multiple of this, so that no piece but the last cuts one of NF4's blocks of 64 numbers."""
AHEAD = 8
"""Pieces that may wait for the disk."""

Bits = np.ndarray[Any, np.dtype[Any]]
"""The content of a tensor as unsigned integers: numpy has no bfloat16."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    path: Path
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int  # in the file, in bytes

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def piece_rows(self) -> int:
        """Rows of a piece; a tensor of one dimension has rows of one number."""
        return max(1, PIECE // max(prod(self.shape[1:]), 1) // BLOCK) * BLOCK


def read_header(path: Path) -> list[Stored]:
    """The tensors of a file in the order in which they lie there. Raises ArtifactError for what is no 16-bit weight."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    found = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in WIDTHS:
            raise ArtifactError(
                f"{path}: {name} is {entry['dtype']}, no 16-bit weight", "name the unquantized original"
            )
        found.append(Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]))
    return found


def read_folder(model: Path) -> dict[Path, list[Stored]]:
    """The tensors of every weight file of a model folder."""
    return {path: read_header(path) for path in sorted(model.glob(WEIGHTS))}


def pieces(tensor: Stored) -> Iterator[Bits]:
    """A tensor's content from first to last: arrays of whole rows, each one's own memory.

    Raises ArtifactError when the file ends before the tensor does.
    """
    width = WIDTHS[tensor.dtype]
    step = tensor.piece_rows * prod(tensor.shape[1:])
    with tensor.path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), tensor.start, tensor.count * width, os.POSIX_FADV_SEQUENTIAL)
        file.seek(tensor.start)
        for first in range(0, tensor.count, step):
            bits = np.empty(min(step, tensor.count - first), f"<u{width}")
            left = bits.data.cast("B")
            while left:
                read = file.readinto(left)
                if not read:
                    raise ArtifactError(f"{tensor.path} ends within {tensor.name}", "fetch or make it again")
                left = left[read:]
            yield bits


def header(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """The beginning of a file with these names and shapes, all of one type, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + prod(shape) * WIDTHS[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Writer:
    """A file that one thread writes and another hashes while its next piece is made."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._waiting: deque[Future[None]] = deque()

    def write(self, data: bytes | Bits) -> None:
        """Take a piece, which must not change any more. Raises OSError for this one or an earlier one."""
        view = memoryview(data) if isinstance(data, bytes) else data.data.cast("B")
        while len(self._waiting) > 2 * AHEAD:
            self._waiting.popleft().result()
        for thread, work in zip(self._threads, (self._put, self._sha256.update), strict=True):
            self._waiting.append(thread.submit(work, view))

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def finish(self) -> str:
        """Wait for all pieces; the sha256 of the file."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._sha256.hexdigest()

    def close(self) -> None:
        """End the threads and the file, also when not all was written."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        self._file.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """A file to write; closed at the end, and left as it is where an error ends it."""
    writer = Writer(path)
    try:
        yield writer
    finally:
        writer.close()
