"""What a user sees of the set-up: progress in place on a terminal, plain lines elsewhere.

In: lines of uv, pip and the build scripts. Out: text on stderr. Does not start or end programs.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import Protocol, TextIO

INTERVAL = 5.0
"""Seconds between two plain lines of progress where no terminal shows them in place."""
UNPACKED = 1.9
"""Bytes that uv writes for a downloaded byte, measured over the demo's wheels (6.2 GB of 3.2 GB)."""
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}
"""Units of sizes in the output of uv and of pip, in bytes."""


class Display:
    """Lines of progress on a stream. On a terminal the newest one replaces the one before it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.in_place = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._shown = ""
        self._time = 0.0

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._write(f"\r\x1b[K{text}\n" if self._shown else f"{text}\n")
        self._shown = ""

    def progress(self, text: str) -> None:
        """Show the state of what runs; without a terminal at most one line in INTERVAL seconds."""
        if self.in_place:
            if text != self._shown:
                width = shutil.get_terminal_size().columns - 1
                self._write(f"\r\x1b[K{text[:width]}")
                self._shown = text
        elif time.monotonic() >= self._time + INTERVAL:
            self._time = time.monotonic()
            self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed: the set-up ends by its own signal
            self.stream.write(text)
            self.stream.flush()


class Reader(Protocol):
    """What is known of a running program from its lines; `written` is the number of bytes that it wrote to files."""

    written: int

    def read(self, line: str) -> None:
        """Take the next line of output."""

    def state(self) -> str:
        """Return the progress in words."""


class UvReader:
    """Progress of `uv pip install`: it prints a line where a large download begins and where it ends."""

    def __init__(self) -> None:
        self.written = 0
        self.packages = 0
        self.sizes: dict[str, float] = {}
        self.done: set[str] = set()
        self._prepared = False

    def read(self, line: str) -> None:
        """Take the next line of output."""
        if found := re.match(r"\s*Downloading (\S+) \(([\d.]+)\s*(\w+)\)", line):
            self.sizes[found[1]] = float(found[2]) * UNITS.get(found[3], 1)
        elif found := re.match(r"\s*Downloaded (\S+)", line):
            self.done.add(found[1])
        elif found := re.match(r"(?:Resolved|Audited|Checked) (\d+) package", line):
            self.packages = int(found[1])
        elif line.startswith("Prepared"):
            self._prepared = True

    def state(self) -> str:
        """Return the progress in words."""
        if self._prepared:
            return f"installing {self.packages} packages"
        if not self.sizes:
            return "reading the package index"
        total = sum(self.sizes.values())
        complete = sum(size for name, size in self.sizes.items() if name in self.done)
        done = min(total, max(complete, self.written / UNPACKED))
        return f"{gigabytes(done)} of {gigabytes(total)} GB, {len(self.done)} of {len(self.sizes)} files"

    def summary(self) -> str:
        """Return what was installed, in words."""
        downloaded = f", {gigabytes(sum(self.sizes.values()))} GB downloaded" if self.sizes else ""
        return f"{self.packages} packages{downloaded}"


class PipReader:
    """Progress of `pip install`, which downloads one package after the other."""

    def __init__(self, packages: int) -> None:
        self.written = 0
        self.packages = packages
        self._seen = 0
        self._bytes = 0.0
        self._name = ""
        self._installing = False

    def read(self, line: str) -> None:
        """Take the next line of output."""
        if line.startswith("Ignoring "):
            self.packages -= 1
        elif found := re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line):
            self._seen += 1
            self._name = found[1]
        elif found := re.match(r"\s+Downloading \S+ \(([\d.]+) (\w+)\)", line):
            self._bytes += float(found[1]) * UNITS.get(found[2], 1)
        elif line.startswith("Installing collected"):
            self._installing = True

    def state(self) -> str:
        """Return the progress in words."""
        if self._installing:
            return f"installing {self.packages} packages"
        if not self._seen:
            return "reading the package index"
        return f"{self._seen} of {self.packages} packages, {gigabytes(self._bytes)} GB ({self._name})"

    def summary(self) -> str:
        """Return what was installed, in words."""
        return f"{self._seen} packages, {gigabytes(self._bytes)} GB downloaded"


class ToolReader:
    """Progress of a build script: `N of M` after the tool's name, or Ninja's `[N/M]`."""

    def __init__(self) -> None:
        self.written = 0
        self._state = "in progress"

    def read(self, line: str) -> None:
        """Take the next line of output."""
        if found := re.match(r"(?:[\w.]+: (\d+) of (\d+)|\[(\d+)/(\d+)\])", line):
            self._state = f"{found[1] or found[3]} of {found[2] or found[4]}"

    def state(self) -> str:
        """Return the progress in words."""
        return self._state


def gigabytes(size: float) -> str:
    """Return a size in GB with one decimal place, a small one with two."""
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2f}"


def written_by(pid: int) -> int:
    """Return the number of bytes that a process has written; 0 where the system does not count them (no /proc)."""
    try:
        text = Path(f"/proc/{pid}/io").read_text("utf-8")
    except OSError:
        return 0
    found = re.search(r"^wchar: (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
