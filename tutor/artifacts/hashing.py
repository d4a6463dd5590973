"""sha256 of values and of files; a file's hash is remembered by its state: size, times, inode and device.

In: a value, or a file and the JSON file that holds the remembered hashes. Out: hexadecimal sha256. A file in another
state is read again; one that changes while it is read is never remembered. Independent of stages.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json_object, write_json
from tutor.errors import ArtifactError

HASHES = ".hashes.json"
"""File of a build folder that holds the remembered hashes."""
MAX_READS = 2
"""Maximum number of times that a file is read to find one content in it."""
SETTLED_NS = 2 * 10**9
"""Nanoseconds since a file's last change before its state is remembered: two changes within one tick of the file
system's clock (2 s on FAT) leave one state."""


def json_sha256(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content. Raises ArtifactError when it cannot be read, or changes while it is read."""
    return _stable_sha256(path)[0]


def _stable_sha256(path: Path) -> tuple[str, str]:
    """sha256 and state of a file; the state is equal before and after reading."""
    try:
        for _ in range(MAX_READS):
            state = file_state(path)
            with path.open("rb") as handle:
                value = hashlib.file_digest(handle, "sha256").hexdigest()
            if file_state(path) == state:
                return value, state
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    raise ArtifactError(f"{path} changed while it was read", "run again when no other program writes it")


def cached_sha256(path: Path, cache: Path) -> str:
    """sha256 of an input file, remembered by its state: 16 GB of weights are read once. Raises as `file_sha256`."""
    if known := known_sha256(path, cache):
        return known
    value, state = _stable_sha256(path)
    if is_settled(path):
        # The cache only saves time: `tutor status` must work on a full or read-only disk.
        with contextlib.suppress(OSError):
            _remember(path, cache, value, state)
    return value


def known_sha256(path: Path, cache: Path) -> str | None:
    """The remembered sha256 of a file; None when its state is another one, or it cannot be read."""
    entry = (read_json_object(cache) or {}).get(str(path.resolve()))
    with contextlib.suppress(OSError):
        if isinstance(entry, dict) and entry.get("seen") == file_state(path) and "sha256" in entry:
            return str(entry["sha256"])
    return None


def remember_sha256(path: Path, cache: Path, value: str) -> None:
    """Store the sha256 of a file that this process wrote, for `known_sha256`.

    Raises OSError when the cache cannot be written.
    """
    _remember(path, cache, value, file_state(path))


def _remember(path: Path, cache: Path, value: str, state: str) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    known = read_json_object(cache) or {}
    write_json(cache, {**known, str(path.resolve()): {"seen": state, "sha256": value}})


def file_state(path: Path) -> str:
    """Size, mtime, ctime, inode and device of a file: while they are equal, the content is assumed to be equal.

    No program can set ctime, so that a change which keeps size and mtime (cp -p, touch -r) is another state.
    """
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}-{stat.st_ino}-{stat.st_dev}"


def is_settled(path: Path) -> bool:
    """Whether the last change of a file is long enough ago for a later one to change its state."""
    try:
        return abs(time.time_ns() - path.stat().st_ctime_ns) > SETTLED_NS
    except OSError:
        return False
