"""Sets of pins, and what of them is in .venv: one marker a set, with the hash of its pins.

In: the checkout. Out: whether a set is installed, and whether there is space for it. Does not install.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from environment.faults import AGAIN, SetupError

SETS = {
    "light": ("base", "wheel"),
    "build": ("build", "wheel"),
    "demo": ("build", "wheel", "train", "demo"),
    "dev": ("dev",),
    "lock": ("uv",),
}
"""Files of requirements/ for each set. dev.txt has every pin of the other sets but demo.txt's."""
PARTS = {"demo": ("train", "demo")}
"""Files that are installed for a set where another set, which is complete, has the rest."""
CONTAINED = {"dev": ("light", "build"), "demo": ("light", "build"), "build": ("light",)}
"""Sets that are complete where another set is."""
TITLES = {
    "light": "environment",
    "build": "build tools",
    "demo": "environment",
    "dev": "development tools",
    "lock": "uv",
}
"""Names of the sets in the lines of progress."""
SPACE = {"light": 0.3, "build": 0.6, "demo": 7.3, "dev": 7.1, "lock": 0.1}
"""Disk space for each set in GB where uv installs, the demo's with llama.cpp: measured on Linux, PyTorch for GPUs."""
PIP_SPACE = 1.5
"""Factor of the space where pip installs: it keeps the downloads beside what it unpacks."""
INSTALLED = "installer"
"""Name of the marker of a complete virtual environment: the installer that is in it."""
UNFINISHED = "unfinished"
"""Name of the file with the set whose packages are being written, or were when an installation was cut off."""


class Environment:
    """The virtual environment of a checkout and its markers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.uv = self.folder / "bin" / "uv"

    def pins(self, name: str) -> list[Path]:
        """Return the files with the pins of a set."""
        return [self.root / "requirements" / f"{file}.txt" for file in SETS[name]]

    def parts(self, name: str) -> list[Path]:
        """Return the files to install for a set; the demo's are installed after those of its build tools."""
        return [self.root / "requirements" / f"{file}.txt" for file in PARTS.get(name, SETS[name])]

    def key(self, name: str) -> str:
        """Return the hash of all that decides what a set installs."""
        digest = hashlib.sha256()
        for path in (*self.pins(name), self.root / "pyproject.toml"):
            digest.update(path.read_bytes() + b"\0")
        return digest.hexdigest()

    def has(self, name: str) -> bool:
        """Return whether a set is completely installed, with today's pins."""
        return not (self.folder / UNFINISHED).exists() and self._marker(name) == self.key(name)

    def confirm(self, name: str) -> None:
        """Make a set's marker newer than its pins, for Make."""
        (self.folder / name).touch()

    def begin(self, name: str) -> bool:
        """Remove the markers that installing a set makes untrue; return whether an earlier installation was cut off."""
        cut_off = self._marker(UNFINISHED) is not None
        for other in SETS:
            if cut_off or self._marker(other) != self.key(other):
                (self.folder / other).unlink(missing_ok=True)
        if not cut_off:
            (self.folder / UNFINISHED).write_text(name, "utf-8")
        return cut_off

    def finish(self, name: str) -> None:
        """Write the markers of a set and of those in it: they are completely installed."""
        complete = (name, *CONTAINED.get(name, ()))
        if self._marker(UNFINISHED) in complete:
            (self.folder / UNFINISHED).unlink()
        for other in complete:
            (self.folder / other).write_text(self.key(other), "utf-8")

    def installer(self) -> str | None:
        """Return what installs into this environment: the key of uv's pin, or "pip"; None where it is not whole."""
        works = (
            self.python.exists()
            and not subprocess.run([self.python, "-c", "import pip"], capture_output=True, check=False).returncode
        )
        return self._marker(INSTALLED) if works else None

    def clear(self) -> None:
        """Make the folder, or empty it; it may be a link to another disk.

        Raises SetupError for a folder with files of its own: the link can lead to any.
        """
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "bin").exists():
            ours = {*SETS, INSTALLED, UNFINISHED, "lib", "lib64", "include", "pyvenv.cfg", ".lock", ".gitignore"}
            names = sorted(path.name for path in self.folder.iterdir() if path.suffix != ".log")
            if other := [name for name in names if name not in ours]:
                raise SetupError(f"{self.folder} is no virtual environment: it holds {other[0]}", "move it away")
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _marker(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text("utf-8")
        except OSError:
            return None


def free_space(folders: Iterable[Path]) -> float:
    """Return the free space in GB on the fullest of the disks of these folders."""
    return min(shutil.disk_usage(_existing(folder)).free for folder in folders) / 1e9


def refuse_small_disk(need: float, folders: tuple[Path, ...]) -> None:
    """Raise SetupError where less is free than `need` GB; what the folders already contain counts as free."""
    free = free_space(folders)
    if free >= need:
        return
    there = sum(map(_size, folders)) / 1e9
    if free + there >= need:
        return
    fullest = min(folders, key=lambda folder: shutil.disk_usage(_existing(folder)).free)
    raise SetupError(
        f"not enough disk space for {fullest}: {free:.1f} GB free, {need - there:.1f} GB needed",
        f"delete something or use another disk (UV_CACHE_DIR names the cache); {AGAIN}",
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(folder: Path) -> int:
    """Return the bytes in a folder; a file with several links, which uv makes, counts a share in each."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))  # noqa: PTH118 - 60,000 files: a Path each takes seconds
            except OSError:
                continue
            size += found.st_blocks * 512 // found.st_nlink
    return size
