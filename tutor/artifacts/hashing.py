"""sha256 of values and of files; a file's hash is remembered by its size, mtime and inode.

In: a value, or a file and the JSON file that holds the remembered hashes. Out: hexadecimal sha256. A file that changed
in size, mtime or inode is read again. Independent of stages.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json_object, write_json
from tutor.errors import ArtifactError

HASHES = ".hashes.json"
"""File of a build folder that holds the remembered hashes."""


def json_sha256(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content. Raises ArtifactError when it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None


def cached_sha256(path: Path, cache: Path) -> str:
    """sha256 of an input file, remembered by size, mtime and inode: 16 GB of weights are read once."""
    if known := known_sha256(path, cache):
        return known
    value = file_sha256(path)
    # The cache only saves time: `tutor status` must work on a full or read-only disk.
    with contextlib.suppress(OSError):
        remember_sha256(path, cache, value)
    return value


def known_sha256(path: Path, cache: Path) -> str | None:
    """The remembered sha256 of a file; None when size, mtime or inode changed since."""
    entry = (read_json_object(cache) or {}).get(str(path.resolve()))
    if isinstance(entry, dict) and entry.get("seen") == file_state(path) and "sha256" in entry:
        return str(entry["sha256"])
    return None


def remember_sha256(path: Path, cache: Path, value: str) -> None:
    """Store a file's sha256 for `known_sha256`. Raises OSError when the cache cannot be written."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        cache, {**(read_json_object(cache) or {}), str(path.resolve()): {"seen": file_state(path), "sha256": value}}
    )


def file_state(path: Path) -> str:
    """Size, mtime and inode of a file: while they are equal, the content is assumed to be equal."""
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
