"""A lock that gives each build folder one writer at a time.

In: the build folder. Out: a context that holds the lock, or a LockError that names the holder. Does not lock single
stages, and does not wait.
"""

import contextlib
import datetime
import errno
import os
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from tutor.artifacts.disk import host_fault, read_json_object, write_json
from tutor.errors import HostError, LockError

LOCK = ".lock"
"""File that the kernel locks."""
SOFT_LOCK = ".lock.soft"
"""File that is the lock by existing, on a file system that has no locks."""
HOLDER = ".lock.json"
"""File that names the holder, for the message of another run."""
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a build folder. Raises LockError at once, with the holder, when another run holds the lock.

    The kernel frees the lock when its holder ends, so that a killed run never blocks the next one. Where the file
    system has no locks, a file is the lock: that of a killed process is removed on its own host only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    except Timeout:
        raise _held_error(folder) from None
    except OSError as error:
        raise _disk_error(error, folder) from None
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # Only the message above needs this file: `tutor clean` must work on a full disk.
        with contextlib.suppress(OSError):
            write_json(folder / HOLDER, {"pid": os.getpid(), "host": platform.node(), "since": now})
        yield
    finally:
        with contextlib.suppress(OSError):  # of a network disk that is gone; the process is about to end
            lock.release()


def _acquire(folder: Path) -> BaseFileLock:
    """Take the kernel's lock, or the file where there is none. Raises Timeout, OSError."""
    lock: BaseFileLock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(folder / SOFT_LOCK)
        lock.acquire(timeout=0)
    return lock


def _held_error(folder: Path) -> LockError:
    """The error that names the holder of a lock, and how a lock is cleared that a dead host has left."""
    who = {"pid": "?", "host": "?", "since": "?"} | (read_json_object(folder / HOLDER) or {})
    elsewhere = who["host"] != platform.node()
    file = SOFT_LOCK if (folder / SOFT_LOCK).exists() else LOCK
    hint = f"; if that process is gone: rm {shlex.quote(str(folder / file))}" if elsewhere else ""
    return LockError(
        f"{folder} is in use by process {who['pid']} on {who['host']} since {who['since']}",
        f"wait for it, or end it{hint}",
    )


def _disk_error(error: OSError, folder: Path) -> HostError:
    """The error of a folder that cannot be made or locked."""
    fault = host_fault(error, folder)
    hint = fault.hint if fault else "give --build a folder that can be written"
    return HostError(f"cannot write {folder}: {error.strerror}", hint)
