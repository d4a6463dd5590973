"""Strict JSON Lines. In: a path, plain or gzip, or a .json array. Out: each line's JSON value, or its fault.

Helper of the data stage: knows bytes and JSON, not what a row means. Never repairs; what it tolerates it counts.
"""

import errno
import gzip
import hashlib
import io
import json
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

BOM = b"\xef\xbb\xbf"
WIDE_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",  # before UTF-16, whose mark it begins with
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
BLANKS = (" ", "\t", "\n", "\r")
TOO_DEEP = "is nested too deeply"
ONE_LINE = "write one object a line: jq -c . FILE > rows.jsonl (jq -c '.[]' for an array, or name it .json)"
ICONV = "save it as UTF-8, from Windows for example: iconv -f WINDOWS-1252 -t UTF-8 FILE > rows.jsonl"


@dataclass(frozen=True)
class Limits:
    """How much is read before it is an error: bytes of one line, bytes once unpacked, problems that are listed."""

    max_line_bytes: int = 2 * 2**20
    max_total_bytes: int = 2**30
    max_problems: int = 20


class RowError(ValueError):
    """One row that is not usable. `unfinished`: its JSON ends before it is complete."""

    def __init__(self, message: str, hint: str | None = None, *, unfinished: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.unfinished = unfinished


Stream = BinaryIO | gzip.GzipFile
Found = tuple[int, Any]
"""A line, and the JSON value in it or the RowError that says why there is none."""


def check_file(path: Path, max_bytes: int = Limits.max_total_bytes) -> None:
    """Check that a path names a file that can be read, without opening it: a FIFO would block.

    Raises RecipeError when the name is wrong, DataError when the file is out of reach or larger than `max_bytes`.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _no_file(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise RecipeError(f"{path} is a folder", "name the .jsonl file in it")
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
    """The file's SHA-256. On the way out ArtifactError if it is no longer the same, whatever else was wrong with it."""
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


def read_values(path: Path, limits: Limits, seen: Counter[str]) -> Iterator[Found]:
    """Each row's line and value; counts "blank" lines, "bom" and "gzip" in `seen`.

    Raises DataError where not one row but the file as a whole is wrong.
    """
    names = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    reader = _array if names[-1:] == [".json"] else _lines
    try:
        with path.open("rb") as file:
            packed = file.peek(2).startswith(b"\x1f\x8b")
            seen["gzip"] += packed
            yield from reader(gzip.GzipFile(fileobj=file) if packed else file, path, limits, seen)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: gz damaged ({error})", "compress or copy it again") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(stream: Stream, path: Path, limits: Limits, seen: Counter[str]) -> Iterator[Found]:
    first = True
    for line, raw in enumerate(_raw_lines(stream, path, limits), 1):
        if line == 1:
            _refuse_wide(raw, path)
        seen["bom"] += raw.startswith(BOM)
        content = raw.removeprefix(BOM)
        ended = content.endswith(b"\n")
        content = content.removesuffix(b"\n").removesuffix(b"\r") if ended else content
        if not content.strip():
            seen["blank"] += 1
            continue
        try:
            yield line, _parse(content, limits.max_line_bytes, ended=ended)
        except RowError as fault:
            if first:
                _refuse_layout(content, fault, f"{path}:{line}", ended=ended)
            yield line, fault
        first = False


def _raw_lines(stream: Stream, path: Path, limits: Limits) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long only the beginning, so that memory stays flat."""
    most = limits.max_line_bytes + len(b"\r\n")
    total = 0
    while raw := stream.readline(most):
        rest = raw
        total += len(raw)
        while len(rest) == most and not rest.endswith(b"\n") and total <= limits.max_total_bytes:
            rest = stream.readline(most)
            total += len(rest)
        if total > limits.max_total_bytes:
            raise _too_large(path, limits)
        yield raw


def _too_large(path: Path, limits: Limits) -> DataError:
    return DataError(f"{path}: more than {limits.max_total_bytes} bytes once unpacked", "split it")


def _refuse_wide(raw: bytes, path: Path) -> None:
    name = next((name for mark, name in WIDE_BOMS.items() if raw.startswith(mark)), None)
    if name is None and len(raw) > 1 and 0 in raw[:2]:
        name = "UTF-16LE" if raw[0] else "UTF-16BE"  # no mark, yet every other byte of ASCII is 0
    if name:
        raise DataError(f"{path} is {name}, not UTF-8", f"iconv -f {name} -t UTF-8 {path} > rows.jsonl")


def _refuse_layout(content: bytes, fault: RowError, where: str, *, ended: bool) -> None:
    """Raise DataError when the first row says that the whole file is laid out in another way."""
    if not ended and b"\r" in content.rstrip():
        raise DataError(f"{where}: no LF found, old-Mac line ends (CR)", "tr '\\r' '\\n' < FILE > rows.jsonl")
    if ended and fault.unfinished and content.rstrip()[-1:] in (b"{", b"[", b",", b":"):
        raise DataError(f"{where}: the JSON goes on in the next line: pretty-printed?", ONE_LINE)


def _array(stream: Stream, path: Path, limits: Limits, seen: Counter[str]) -> Iterator[Found]:
    """A .json file: one array of objects, read whole; anything else in it is taken as JSON Lines."""
    data = stream.read(limits.max_total_bytes + 1)
    if len(data) > limits.max_total_bytes:
        raise _too_large(path, limits)
    if not data.removeprefix(BOM).lstrip().startswith(b"["):
        yield from _lines(io.BytesIO(data), path, limits, seen)
        return
    seen["bom"] += data.startswith(BOM)
    data = data.removeprefix(BOM)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, _not_utf8(error)
        return
    line, counted = 1, 0
    for start, found in _elements(text, limits.max_line_bytes):
        line, counted = line + text.count("\n", counted, start), start
        yield line, found


def _elements(text: str, most: int) -> Iterator[Found]:
    """Each element of an array with its position. A syntax error ends it: nothing says where the next one begins."""
    at = _skip(text, text.index("[") + 1)
    mark = "]" if text.startswith("]", at) else ","
    end = at
    while mark == ",":
        try:
            value, end = _decode(text, at)
        except RowError as fault:
            yield at, fault
            return
        yield at, value if end - at <= most else RowError(f"is longer than {most} bytes", "is a line end missing?")
        end = _skip(text, end)
        mark, at = text[end : end + 1], _skip(text, end + 1)
    if mark != "]" or _skip(text, end + 1) < len(text):
        yield end, RowError("the array goes wrong here: no comma, no ] or more text behind it")


def _parse(content: bytes, most: int, *, ended: bool) -> Any:
    """The JSON value of one line. Raises RowError."""
    if len(content) > most:
        raise RowError(f"is longer than {most} bytes", "is a line end missing?")
    if b"\0" in content:
        raise RowError("holds a raw NUL byte")
    try:
        text = content.decode()
        value, end = _decode(text, _skip(text, 0))
    except UnicodeDecodeError as error:
        fault = _not_utf8(error)
    except RowError as error:
        fault = error
    else:
        if _skip(text, end) < len(text):
            raise RowError(f"more than one JSON value in the line, at column {end + 1}", ONE_LINE)
        return value
    if not ended and fault.unfinished and content.lstrip().startswith(b"{"):
        raise RowError("is unfinished: file cut?", "copy the file again, or delete its last line")
    raise fault


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    byte = error.object[error.start]
    cut = error.end == len(error.object) and error.reason == "unexpected end of data"
    return RowError(f"is not UTF-8 at byte {error.start + 1} (0x{byte:02x})", ICONV, unfinished=cut)


def _skip(text: str, at: int) -> int:
    """The first position from `at` on that is no JSON blank."""
    while text[at : at + 1] in BLANKS:
        at += 1
    return at


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends. Raises RowError."""
    try:
        value, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        rest = text[at : at + 2]
        if rest in ("//", "/*") or rest.startswith("#"):
            raise RowError("is a comment, which JSON does not have") from None
        unfinished = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        raise RowError(f"is not JSON: {error.msg} at column {error.colno}", unfinished=unfinished) from None
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    except ValueError as error:
        raise error if isinstance(error, RowError) else RowError("holds a number of too many digits") from None
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(f"has the key {shown(repeated)} twice", "keep one: which is meant is not ours to guess")
    return found


def _constant(name: str) -> Any:
    raise RowError(f"holds {name}, which is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def shown(text: str) -> str:
    """A user's text in a message: printable, on one line, short."""
    return repr(text[:40])[1:-1] + ("…" if len(text) > 40 else "")
