"""Folders that are made once a test run and shared by all workers, below the run's temporary directory.

In: a name and a function that fills a folder. Out: the folder, made by the first worker that needs it. Tests get it as
hard links (`linked`), or as copies (`copied`) where they change a file in place. `changed` lists the changed files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

HASHES = "sha256.json"
NEVER_SHARED = (".lock", ".lock.json", ".hashes.json", ".recipe.json")
"""Files of a build folder that are of one place or are written in place; `*.log` files are copied."""


def root(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all shared folders: one a run, whether or not pytest-xdist runs several workers."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the shared folder `name`; `make` fills it if no worker has done so yet."""
    folder = root(factory) / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / HASHES).exists():
            shutil.rmtree(folder / "made", ignore_errors=True)
            (folder / "made").mkdir()
            make(folder / "made")
            (folder / HASHES).write_text(json.dumps(_hashes(folder / "made")), "utf-8")
    return folder / "made"


def linked(folder: Path, to: Path) -> Path:
    """Copy a folder by hard links: a test that replaces files leaves the shared ones alone."""
    return Path(shutil.copytree(folder, to, copy_function=_link, dirs_exist_ok=True))


def copied(folder: Path, to: Path) -> Path:
    """Copy a folder, for a test that changes files in place."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*NEVER_SHARED), dirs_exist_ok=True))


def changed(factory: pytest.TempPathFactory) -> list[str]:
    """Return the shared files that a test has changed since they were made."""
    return [path for folder in sorted(root(factory).glob("*/")) for path in _changed(folder)]


def _changed(folder: Path) -> Iterator[str]:
    if not (folder / HASHES).exists():
        return
    before, now = json.loads((folder / HASHES).read_text("utf-8")), _hashes(folder / "made")
    yield from (
        f"{folder.name}/{name}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    )


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in NEVER_SHARED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _link(source: str, to: str) -> str:
    if ".log" in (Path(source).suffix, Path(source).parent.suffix):
        shutil.copy2(source, to)
    elif Path(source).name not in NEVER_SHARED:
        os.link(source, to)
    return to
