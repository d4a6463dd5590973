"""Stream tensor data: read a tensor piece by piece, write a file while it is hashed.

In: tensors of files that were checked (safetensors.py). Out: numpy arrays of bits, and files. Maps nothing into memory,
so that a process is as large as the piece it works on. Computes with no numbers, and needs no torch.
"""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import WIDTHS, Stored

PIECE = 1 << 20
"""Approximate number of numbers in a piece: it stays in the processor's cache from reading to writing."""
BLOCK = 64
"""Divisor of the rows of a piece: no piece but the last cuts one of NF4's blocks of 64 numbers."""
AHEAD = 8
"""Maximum number of pieces that wait for the disk."""

Bits = np.ndarray[Any, np.dtype[Any]]
"""Content of a tensor as unsigned integers: numpy has no bfloat16."""


def piece_rows(tensor: Stored) -> int:
    """Return the number of rows in a piece; a tensor of one dimension has rows of one number."""
    return max(1, PIECE // max(prod(tensor.shape[1:]), 1) // BLOCK) * BLOCK


def pieces(tensor: Stored) -> Iterator[Bits]:
    """Yield a tensor's content from first to last: arrays of whole rows, each with memory of its own.

    Raises ArtifactError when the file ends before the tensor does.
    """
    width = WIDTHS[tensor.dtype]
    step = piece_rows(tensor) * prod(tensor.shape[1:])
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


def largest_magnitude(bits: Bits) -> int:
    """Return the bits of the largest magnitude among floats: without the sign, floats order like their bits.

    A NaN's bits are larger than those of infinity.
    """
    sign = 1 << (8 * bits.itemsize - 1)
    unsigned = int(bits.max())  # a negative number's bits when there is one
    return max(int(bits.view(f"i{bits.itemsize}").max()), unsigned - sign)


class Writer:
    """A file that one thread writes and another hashes while the next piece is made."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._waiting: deque[Future[None]] = deque()

    def write(self, data: bytes | Bits) -> None:
        """Queue a piece, which must not change afterwards. Raises OSError for this piece or an earlier one."""
        view = memoryview(data) if isinstance(data, bytes) else data.data.cast("B")
        while len(self._waiting) > 2 * AHEAD:
            self._waiting.popleft().result()
        for thread, work in zip(self._threads, (self._put, self._sha256.update), strict=True):
            self._waiting.append(thread.submit(work, view))

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def finish(self) -> str:
        """Wait for all pieces; return the file's sha256."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Stop the threads and close the file, even when not all was written."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        self._file.close()


@contextlib.contextmanager
def open_writer(path: Path) -> Iterator[Writer]:
    """Open a file to write; closed at the end, and left unfinished where an error ends it."""
    writer = Writer(path)
    try:
        yield writer
    finally:
        writer.close()
