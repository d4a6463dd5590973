"""Import files of rows into one file of tutor's own rows.

In: files in any known form. Out: a JSON Lines file, whole or absent, whose rows pass the rows' own checks; a second
one with every row that was left out, and why; counts. A system text that all rows share is left out of them and
returned. Changes no text beyond line ends.
"""

import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tutor.artifacts.disk import whole_file
from tutor.errors import DataError
from tutor.formats.importing.dataset_folders import read_dataset_folder
from tutor.formats.importing.names import Options, Recognised
from tutor.formats.importing.reading import read_records
from tutor.formats.importing.shapes import convert, own_row
from tutor.formats.rows.conversations import MESSAGES
from tutor.formats.rows.json_values import ICONV, RowError
from tutor.formats.rows.jsonl import Limits, check_file, unchanged
from tutor.formats.rows.rows import ExampleRow, parse_row

QUIET_SECONDS = 2.0
"""Seconds before the first message of progress."""
CHECK_EVERY = 500
"""Number of rows between two looks at the clock."""
KEYS = frozenset((*ExampleRow.model_fields, MESSAGES)) - {"history"}
"""Keys of a row that are written."""
LEFT_OUT = ".left-out.jsonl"
"""Ending of the file with the rows that were left out, after the output's name."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeftOut:
    """A row that was not taken, and why."""

    file: str
    line: int
    why: str


@dataclass
class FileResult:
    """Counts of one file."""

    file: str
    recognised: Recognised
    taken: int = 0
    left_out: int = 0
    tolerated: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "file": self.file,
            "container": self.recognised.container,
            "formats": dict(self.recognised.formats),
            "taken": self.taken,
            "left_out": self.left_out,
            "dropped_keys": dict(self.recognised.dropped),
            "blank": self.tolerated["blank"],
        }


@dataclass
class Import:
    """The result of an import: counts by file, the rows that were left out, the system text that all rows share."""

    files: list[FileResult] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    system: str = ""
    systems: set[str] = field(default_factory=set)  # the first two that differ; "": none

    @property
    def taken(self) -> int:
        """Number of rows that were taken."""
        return sum(each.taken for each in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        rows = {"rows": self.taken, "left_out": len(self.left_out), "system": self.system or None}
        files = [each.as_dict() for each in self.files]
        return {**rows, "files": files, "rows_left_out": [asdict(each) for each in self.left_out]}


def import_files(
    files: Sequence[Path], output: Path, options: Options, *, strict: bool = False, limits: Limits | None = None
) -> Import:
    """Import files into `output`, and the rows that were left out into a file beside it.

    `strict`: a row that is left out is an error. Raises DataError where no row can be taken or a file as a whole is
    wrong, RecipeError where there is none, ArtifactError when one changes meanwhile; then nothing is written.
    """
    result = Import()
    output = output.resolve()  # a link stays, and its target is written
    beside = left_out_path(output)
    with (
        tempfile.TemporaryFile(dir=output.parent) as rows,
        tempfile.TemporaryFile(dir=output.parent) as refused,
    ):
        work = _Work(result, options, limits or Limits(), rows, refused)
        for path in files:
            work.read(path)
        if not result.taken or (strict and result.left_out):
            raise _nothing_taken(result)
        if result.systems != {""} and len(result.systems) == 1:
            result.system = next(iter(result.systems))
        rows.seek(0)
        refused.seek(0)
        with whole_file(output) as out:
            out.writelines(_without_system(rows) if result.system else rows)
        if result.left_out:
            with whole_file(beside) as out:
                out.writelines(refused)
        else:
            beside.unlink(missing_ok=True)  # of an import before this one
    return result


def left_out_path(output: Path) -> Path:
    """Return the path of the file with the rows that were left out."""
    return output.with_name(output.name + LEFT_OUT)


def _nothing_taken(result: Import) -> DataError:
    count = len(result.left_out)
    reasons = Counter(each.why for each in result.left_out).most_common(3)
    shown = "; ".join(f"{number} x {why}" for why, number in reasons) or "0 rows"
    what = f"{count} of {count + result.taken} rows are left out" if result.taken else "no row can be taken"
    files = ", ".join(each.file for each in result.files)
    problems = tuple(f"{each.file}:{each.line}: {each.why}" for each in result.left_out)
    return DataError(f"{files}: {what}: {shown}", None, problems)


@dataclass
class _Work:
    """An import while files are read: rows, and those that are left out, go to two files."""

    result: Import
    options: Options
    limits: Limits
    rows: IO[bytes]
    refused: IO[bytes]
    read_rows: int = 0
    logged: bool = False
    began: float = field(default_factory=time.monotonic)

    def read(self, path: Path) -> None:
        """Read one file. Raises as `import_files`."""
        counts = FileResult(str(path), Recognised())
        self.result.files.append(counts)
        with ExitStack() as stack:
            if path.is_dir():
                records = read_dataset_folder(path, self.limits, counts.recognised)
            else:
                check_file(path, self.limits.max_total_bytes)
                stack.enter_context(unchanged(path))
                records = read_records(path, self.limits, counts.tolerated, self.options, counts.recognised)
            for line, found in records:
                self._log(path)
                try:
                    self._take(_checked(found, self.options, counts.recognised))
                    counts.taken += 1
                except RowError as fault:
                    if fault.hint == ICONV:  # one such row means that the file is in another encoding
                        raise DataError(f"{path}:{line}: {fault}", ICONV) from None
                    counts.left_out += 1
                    self._leave_out(path, line, found, fault)

    def _take(self, row: dict[str, Any]) -> None:
        if len(self.result.systems) < 2:
            self.result.systems.add(_system(row))
        self.rows.write(_line(row))

    def _leave_out(self, path: Path, line: int, found: Any, fault: RowError) -> None:
        why = f"{fault}; {fault.hint}" if fault.hint else str(fault)
        self.result.left_out.append(LeftOut(str(path), line, why))
        row = None if isinstance(found, RowError) else found
        self.refused.write(_line({"file": str(path), "line": line, "why": why, "row": row}))

    def _log(self, path: Path) -> None:
        """Log the number of rows after QUIET_SECONDS: the first message begins the bar."""
        self.read_rows += 1
        if self.read_rows % CHECK_EVERY == 0 and time.monotonic() - self.began > QUIET_SECONDS:
            extra = {"done": self.read_rows} if self.logged else {"stage": "import"}
            log.info("import: %s: %d rows read", path.name, self.read_rows, extra=extra)
            self.logged = True


def _checked(found: Any, options: Options, recognised: Recognised) -> dict[str, Any]:
    """Return a row as it is written: our own keys, after the rows' own checks. Raises RowError."""
    if isinstance(found, RowError):
        raise found
    row = convert(found, options, recognised)
    parse_row(row, ExampleRow, recognised.dropped, strict=False)
    return {key: value for key, value in row.items() if key in KEYS}


def _line(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace") + b"\n"


def _system(row: dict[str, Any]) -> str:
    first = row["messages"][0] if row.get("messages") else {}
    return str(first["content"]) if first.get("role") == "system" else ""


def _without_system(rows: IO[bytes]) -> Iterator[bytes]:
    """Rows without their system message, in the shorter form where it serves."""
    for line in rows:
        row = json.loads(line)
        turns = row.pop("messages")[1:]
        yield _line({**own_row(turns), **row})
