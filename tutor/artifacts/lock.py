"""A lock that gives each build folder one writer at a time.

In: the build folder. Out: a context that holds the lock, or a LockError that names the holder. Does not lock single
stages, and does not wait.
"""

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tutor.artifacts.disk import read_json_object, write_json
from tutor.errors import HostError, LockError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a build folder. Raises LockError at once, with the holder, when another run holds the lock.

    The kernel frees the lock when its holder ends, so that a killed run never blocks the next one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot make {folder}: {error.strerror}", "give --build a folder that can be written"
        ) from None
    lock, holder = FileLock(folder / ".lock"), folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = {"pid": "?", "host": "?", "since": "?"} | (read_json_object(holder) or {})
        raise LockError(
            f"{folder} is in use by process {who['pid']} on {who['host']} since {who['since']}",
            "wait for it, or end it",
        ) from None
    except OSError as error:
        raise HostError(
            f"cannot write {folder}: {error.strerror}", "give --build a folder that can be written"
        ) from None
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # Only the message above needs this file: `tutor clean` must work on a full disk.
        with contextlib.suppress(OSError):
            write_json(holder, {"pid": os.getpid(), "host": platform.node(), "since": now})
        yield
    finally:
        lock.release()
