"""Writing to disk so that a crash leaves the old file or the new one, and the errors of a disk that refuses.

In: a path and a value, or an exception. Out: a synced file, or a TutorError that names the disk's fault and the free
space. Independent of what the files contain.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError, HostError, TutorError

_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})

_FULL_DISK = 1 << 20
"""Free bytes below which a failed write counts as a full disk; PyTorch raises an error without the reason."""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    """Write JSON whole or not at all, readable by other users (the next service may have another uid)."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # A path whose name is not UTF-8 has half surrogates, which JSON can only hold escaped.
    data = text.encode("utf-8", "backslashreplace")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as handle:
        try:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
            Path(handle.name).chmod(0o644)
            Path(handle.name).replace(path)
        except BaseException:
            Path(handle.name).unlink(missing_ok=True)
            raise
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a folder with its content; a missing folder is not an error."""
    if path.is_symlink():  # a folder on another disk: remove the link alone
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def disk_fault(error: BaseException, partial: Path) -> TutorError | None:
    """The disk's fault that ended a write below `partial`, as an error with the free space; None for other causes."""
    if isinstance(error, TutorError) or not isinstance(error, Exception):
        return None
    # Rust libraries (safetensors) raise their own errors, with the number in the text.
    named = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(named[1]) if named else None
    if number in (errno.ENOENT, None) and not partial.exists():
        return ArtifactError(f"{partial} was removed while it was written", "run again")
    try:
        free = shutil.disk_usage(partial.parent).free
    except OSError:
        free = 0
    if number in _DISK_FAULTS or free < _FULL_DISK:
        where = getattr(error, "filename", None) or partial
        reason = os.strerror(number) if number in _DISK_FAULTS else os.strerror(errno.ENOSPC)
        return HostError(f"{where}: {reason}", f"{free / 1e9:.1f} GB are free in {partial.parent}")
    return None
