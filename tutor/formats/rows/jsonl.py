"""Read a user's JSON Lines strictly: the file, its lines, or the elements of an array.

In: a path, plain or gzip, or a .json array. Out: each line's JSON value, or its error. Does not interpret a row
(rows.py) and repairs nothing; what it tolerates it counts.
"""

import errno
import gzip
import hashlib
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tutor.errors import ArtifactError, DataError, RecipeError
from tutor.formats.rows.json_array import ArrayReader
from tutor.formats.rows.json_values import ONE_LINE, RowError, parse_line

BOM = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8."""
WIDE_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",  # before UTF-16, whose mark is its beginning
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Encoding by byte order mark."""
OTHER_FORMATS = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\0": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK\3\4": "a ZIP archive or a spreadsheet",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
"""Formats that rows often have elsewhere, by their first bytes; none begins a JSON value."""


@dataclass(frozen=True)
class Limits:
    """Limits of reading a file: bytes of a line, bytes once unpacked, listed problems; and what a text may hold."""

    max_line_bytes: int = 2 * 2**20
    max_total_bytes: int = 2**30
    max_problems: int = 20
    turns_as_text: bool = False  # accept lines that begin as a turn of the tutor's prompt: another prompt is trained


Stream = BinaryIO | gzip.GzipFile
LineValue = tuple[int, Any]
"""Line number, and the JSON value of the line or the RowError that explains why there is none."""


def check_file(path: Path, max_bytes: int = Limits.max_total_bytes) -> None:
    """Check that a path names a file that can be read, without opening it: a FIFO would block.

    Raises RecipeError when the name is wrong, DataError when the file is out of reach or larger than `max_bytes`.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _no_file(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise RecipeError(f"{path} is a folder", "name the file in it; tutor data import reads folders of datasets")
    if not stat.S_ISREG(status.st_mode):
        raise RecipeError(f"{path} is a pipe or a device, not a file", "save the rows in a file: it is read twice")
    if status.st_size > max_bytes:
        raise DataError(f"{path} has {status.st_size} bytes; at most {max_bytes} are read", "split it")


def _no_file(path: Path, error: OSError | ValueError) -> RecipeError | DataError:
    if isinstance(error, PermissionError):
        return _unreadable(path, error)
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return RecipeError(f"{path} is a symbolic link that leads to itself", "name the file itself")
    if re.search(r"[*?\[]", path.name):
        return RecipeError(f"{path}: no file of that name", "patterns are not expanded: name one file")
    why = error.strerror if isinstance(error, OSError) else str(error)  # a NUL in the name is a ValueError
    return RecipeError(f"{str(path)!r} cannot be opened: {why}", "correct the path in the recipe")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}", "let this user read it, or copy it elsewhere")


@contextmanager
def unchanged(path: Path) -> Iterator[str]:
    """Give the file's SHA-256; at the end raise ArtifactError if the file changed, before any other error."""
    try:
        before = _sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    fault = None
    try:
        yield before
    except DataError as error:
        fault = error
    try:
        same = _sha256(path) == before
    except OSError:
        same = False
    if not same:
        raise ArtifactError(f"{path}: input changed while it was read", "run again when nothing writes to it")
    if fault:
        raise fault


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_values(path: Path, limits: Limits, tolerated: Counter[str]) -> Iterator[LineValue]:
    """Yield each row's line and value; count "blank" lines, "bom" and "gzip" in `tolerated`.

    Raises DataError where the file as a whole is wrong, not one row.
    """
    reader = _array if suffix(path) == ".json" else _lines
    with opened(path, tolerated) as stream:
        yield from reader(stream, path, limits, tolerated)


def suffix(path: Path) -> str:
    """Return the ending of a file's name in lower case, .gz left out."""
    return next((each.lower() for each in reversed(path.suffixes) if each.lower() != ".gz"), "")


@contextmanager
def opened(path: Path, tolerated: Counter[str]) -> Iterator[Stream]:
    """Open a file, unpacked where it is gzip. Raises DataError where it cannot be read, in the block too."""
    try:
        with path.open("rb") as file:
            packed = file.peek(2).startswith(b"\x1f\x8b")
            tolerated["gzip"] += packed
            yield gzip.GzipFile(fileobj=file) if packed else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: gz damaged ({error})", "compress or copy it again") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(stream: Stream, path: Path, limits: Limits, tolerated: Counter[str]) -> Iterator[LineValue]:
    first = True
    for line, raw in enumerate(raw_lines(stream, path, limits), 1):
        if line == 1:
            refuse_other_format(raw, path)
        tolerated["bom"] += raw.startswith(BOM)
        content = raw.removeprefix(BOM)
        ended = content.endswith(b"\n")
        content = content.removesuffix(b"\n").removesuffix(b"\r") if ended else content
        if not content.strip():
            tolerated["blank"] += 1
            continue
        try:
            yield line, parse_line(content, limits.max_line_bytes, ended=ended)
        except RowError as fault:
            if first:
                _refuse_layout(content, fault, f"{path}:{line}", ended=ended)
            yield line, fault
        first = False


def raw_lines(stream: Stream, path: Path, limits: Limits) -> Iterator[bytes]:
    """Lines with their ends; only the beginning of a line that is too long, so that memory stays flat."""
    max_bytes = limits.max_line_bytes + len(b"\r\n")
    total = 0
    while raw := stream.readline(max_bytes):
        rest = raw
        total += len(raw)
        while len(rest) == max_bytes and not rest.endswith(b"\n") and total <= limits.max_total_bytes:
            rest = stream.readline(max_bytes)
            total += len(rest)
        if total > limits.max_total_bytes:
            raise too_large(path, limits)
        yield raw


def too_large(path: Path, limits: Limits) -> DataError:
    """Return the error of a file that is too large once unpacked."""
    return DataError(f"{path}: more than {limits.max_total_bytes} bytes once unpacked", "split it")


def refuse_other_format(raw: bytes, path: Path) -> None:
    """Raise DataError where a file's beginning is not text in UTF-8."""
    if kind := next((kind for magic, kind in OTHER_FORMATS.items() if raw.startswith(magic)), None):
        raise DataError(f"{path} is {kind}, not JSON Lines", "unpack or convert it: one JSON object a line")
    name = next((name for mark, name in WIDE_BOMS.items() if raw.startswith(mark)), None)
    if name is None and len(raw) > 1 and 0 in raw[:2]:
        name = "UTF-16LE" if raw[0] else "UTF-16BE"  # no mark, yet every other byte of ASCII is 0
    if name:
        raise DataError(f"{path} is {name}, not UTF-8", f"iconv -f {name} -t UTF-8 {path} > rows.jsonl")


def _refuse_layout(content: bytes, fault: RowError, where: str, *, ended: bool) -> None:
    """Raise DataError where the first row shows that the whole file has another layout."""
    if not ended and b"\r" in content.rstrip():
        raise DataError(f"{where}: no LF found, old-Mac line ends (CR)", "tr '\\r' '\\n' < FILE > rows.jsonl")
    if ended and fault.unfinished and content.rstrip()[-1:] in (b"{", b"[", b",", b":"):
        raise DataError(f"{where}: the JSON goes on in the next line: pretty-printed?", ONE_LINE)


def _array(stream: Stream, path: Path, limits: Limits, tolerated: Counter[str]) -> Iterator[LineValue]:
    """Elements of a .json file: one array of objects; anything else in it is read as JSON Lines."""
    reader, first = array_reader(stream, path, limits, tolerated)
    if first != "[":
        stream.seek(0)
        yield from _lines(stream, path, limits, tolerated)
        return
    reader.skip()
    yield from reader.elements(limits.max_line_bytes)


def array_reader(stream: Stream, path: Path, limits: Limits, tolerated: Counter[str]) -> tuple[ArrayReader, str]:
    """Return a reader at the first sign of a JSON file, and this sign; "" where it cannot be read."""
    total = 0

    def read(size: int) -> bytes:
        nonlocal total
        data = stream.read(size)
        total += len(data)
        if total > limits.max_total_bytes:
            raise too_large(path, limits)
        return data

    marked = stream.read(len(BOM)) == BOM
    if not marked:
        stream.seek(0)
    reader = ArrayReader(read)
    try:
        first = reader.next_sign()
    except RowError:
        first = ""
    tolerated["bom"] += marked and first == "["
    return reader, first
