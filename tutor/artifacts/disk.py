"""Writing to disk so that a crash leaves the old file or the new one, and the errors of a disk that refuses.

In: a path and a value, or an exception. Out: a synced file, or a TutorError that names the disk's fault and the free
space. Independent of what the files contain.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tutor.errors import ArtifactError, HostError, TutorError

_DISK_FAULTS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
        errno.EXDEV, errno.ENAMETOOLONG, errno.EMLINK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMFILE,
        errno.ENFILE, errno.ENODEV,
    }
)  # fmt: skip

_FILE_FAULTS = frozenset({errno.ENOTCONN, errno.EBUSY, errno.ENOTDIR, errno.ELOOP, errno.EINVAL})
"""Faults of a disk where the error names a file; without one, a socket or a program can be the cause."""

_NEXT_STEPS = {
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit (ulimit -f), or use a file system that holds larger files",
    errno.EXDEV: "a build folder must be on one file system: give another --build",
    errno.ENAMETOOLONG: "give a shorter --build, or the recipe a shorter name",
    errno.EROFS: "give --build a folder that can be written",
    errno.EACCES: "give --build a folder that can be written",
    errno.EPERM: "give --build a folder that can be written",
    errno.EIO: "the disk or its connection fails: see dmesg",
    errno.ESTALE: "mount the network disk again",
    errno.ENOTCONN: "mount the network disk again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""Next step by fault, where it is not the free space."""

_UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF})
"""Errors of a file system that has no fsync of folders or no permissions; neither is needed to go on."""

_FULL_DISK = 1 << 20
"""Free bytes below which a failed write counts as a full disk; PyTorch raises an error without the reason."""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where its file system can do so."""
    with _tolerated():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _tolerated() -> Iterator[None]:
    """Go on where a file system does not know the operation of the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_file(file: IO[bytes]) -> None:
    """Flush an open file to the disk, where its file system can do so."""
    file.flush()
    with _tolerated():
        os.fsync(file.fileno())


def open_to_users(path: Path) -> None:
    """Give a file or folder the permissions of a new one (umask): libraries make some files for their user alone.

    A file system without permissions keeps its own.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    with _tolerated():
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when the file is missing, damaged or holds another type."""
    try:
        return read_json(path)
    except ArtifactError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ArtifactError when the file is missing or damaged."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, with the permissions of a new file."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # A path whose name is not UTF-8 has half surrogates, which JSON can only hold escaped.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, with the permissions of a new file."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write, which takes its name after the block; an error in the block leaves what is there."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name[:100], delete=False) as handle:
        try:
            yield handle
            sync_file(handle)
            open_to_users(Path(handle.name))
            Path(handle.name).replace(path)
        except BaseException:
            Path(handle.name).unlink(missing_ok=True)
            raise
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link without its target; a missing path is not an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def disk_fault(error: BaseException, partial: Path) -> TutorError | None:
    """The disk's fault that ended a write below `partial` or beside it, as an error; None for other causes."""
    if isinstance(error, TutorError) or not isinstance(error, Exception):
        return None
    number = _number(error)
    named = getattr(error, "filename", None)
    folders = [partial, *([Path(named).parent] if isinstance(named, str) else [])]
    gone = [path for path in folders if path.is_relative_to(partial.parent) and not path.exists()]
    if number in (errno.ENOENT, None) and gone:
        return ArtifactError(f"{gone[0]} was removed while it was written", "run again")
    return host_fault(error, partial)


def host_fault(error: Exception, near: Path) -> HostError | None:
    """The fault of a disk that an exception reports, with the next step or the free space beside `near`; else None."""
    number, named = _number(error), getattr(error, "filename", None)
    free, files = _free(near)
    where = os.fsdecode(named) if isinstance(named, str | bytes) else str(near)
    if number in _DISK_FAULTS or (number in _FILE_FAULTS and named is not None):
        reason = os.strerror(number)
    elif number is None and free < _FULL_DISK and not isinstance(error, OSError):
        reason = os.strerror(errno.ENOSPC)
    else:
        return None
    inodes = "" if files else ", and no inode"
    return HostError(
        f"{where}: {reason}",
        _NEXT_STEPS.get(number or errno.ENOSPC, f"{free / 1e9:.1f} GB are free in {near.parent}{inodes}"),
    )


def _number(error: Exception) -> int | None:
    """The errno of an exception; Rust libraries (safetensors) raise their own errors, with the number in the text."""
    if isinstance(error, OSError):
        return error.errno
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named[1]) if named else None


def _free(near: Path) -> tuple[int, int]:
    """Free bytes and files of the disk that holds `near`; 0 bytes where it cannot be asked."""
    try:
        found = os.statvfs(near.parent)
    except OSError:
        return 0, 1
    return found.f_bavail * found.f_frsize, found.f_favail or int(not found.f_files)
