"""File systems without an operation are tolerated; a disk's fault is one line and exit 4, never a bug.

The faults are those of the system calls: no such disk is here. Covers artifacts/disk.py and lock.py.
"""

import errno
import fcntl
import io
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.outputs.stage_folders import read_stage, write_stage
from support.processes.command import in_process
from support.processes.kills import in_child

from tutor.artifacts.disk import host_fault, write_json
from tutor.artifacts.lock import locked
from tutor.errors import HostError, LockError


def failing(name: str, number: int, *, only: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """A function of `os` that raises an error where `only` holds of its arguments."""
    plain = getattr(os, name)

    def fail(*given: Any, **options: Any) -> Any:
        if only(*given):
            path = given[0] if isinstance(given[0], str | Path) else None
            raise OSError(number, os.strerror(number), *([str(path)] if path else []))
        return plain(*given, **options)

    return fail


def is_folder(given: Any, *_: Any) -> bool:
    return Path(f"/proc/self/fd/{given}" if isinstance(given, int) else given).is_dir()


MISSING = {
    "fsync of folders": ("fsync", errno.EINVAL, is_folder),
    "fsync": ("fsync", errno.EOPNOTSUPP, lambda *_: True),
    "permissions": ("chmod", errno.EPERM, lambda *_: True),
    "permissions, as FUSE says it": ("chmod", errno.ENOSYS, lambda *_: True),
    "symbolic links": ("symlink", errno.EPERM, lambda *_: True),
    "hard links": ("link", errno.EOPNOTSUPP, lambda *_: True),
}


@pytest.mark.parametrize("what", MISSING)
def test_stage_on_a_disk_without_an_operation_is_made(recipe_file, tmp_path, monkeypatch, what):
    name, number, only = MISSING[what]
    monkeypatch.setattr(os, name, failing(name, number, only=only))
    command = ("data", "split", "-r", recipe_file, "-b", tmp_path / "build")
    done = in_process(*command)
    assert done.returncode == 0, done.stderr
    assert "up to date" in in_process(*command).stdout
    write_stage(tmp_path / "stage")
    write_stage(tmp_path / "stage", "newer")
    assert read_stage(tmp_path / "stage") == "newer"


# Locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_locked_without_kernel_locks_still_excludes_others(tmp_path, monkeypatch, number, recwarn):
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert in_child(lambda: locked(tmp_path).__enter__()) == LockError.code
    assert in_child(lambda: (locked(tmp_path).__enter__(), os._exit(0))) == 0  # killed: it leaves the file
    with locked(tmp_path):
        pass
    assert [str(warning.message) for warning in recwarn if "lock" in str(warning.message)] == []


def test_lock_of_another_host_names_the_file_to_remove(tmp_path):
    with locked(tmp_path):
        write_json(tmp_path / ".lock.json", {"pid": 7, "host": "otra", "since": "ayer"})
        with pytest.raises(LockError) as caught, locked(tmp_path):
            pytest.fail("both have it")
    assert str(caught.value) == (
        f"{tmp_path} is in use by process 7 on otra since ayer; "
        f"wait for it, or end it; if that process is gone: rm {tmp_path}/.lock"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": []}', '{"host": null, "since": {}}', "\ufffd" * 99])
def test_locked_with_a_damaged_holder_file(tmp_path, text):
    with locked(tmp_path):
        (tmp_path / ".lock.json").write_text(text)
        with pytest.raises(LockError, match="is in use by process"), locked(tmp_path):
            pytest.fail("both have it")
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path):
        assert platform.node() in (tmp_path / ".lock.json").read_text()


# Faults


FAULTS = {
    "ENOSPC": ("mkdir", r"No space left on device; .* are free in"),
    "EDQUOT": ("mkdir", "Disk quota exceeded; free some of your quota"),
    "EIO": ("fsync", "Input/output error; the disk or its connection fails"),
    "ESTALE": ("mkdir", "Stale file handle; mount the network disk again"),
    "ENOTCONN": ("mkdir", "Transport endpoint is not connected; mount the network disk again"),
    "EROFS": ("mkdir", "Read-only file system; give --build a folder that can be written"),
    "EACCES": ("mkdir", "Permission denied; give --build"),
    "EXDEV": ("rename", "Invalid cross-device link; a build folder must be on one file system"),
    "EBUSY": ("rename", "Device or resource busy"),
    "ENAMETOOLONG": ("mkdir", "File name too long; give a shorter --build"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_disk_fault_in_a_stage_is_one_line_and_exit_4(recipe_file, tmp_path, monkeypatch, name):
    call, expected = FAULTS[name]
    build = tmp_path / "build"
    (build / "small").mkdir(parents=True)
    # The stage's own calls: the lock and the record of the recipe come before it.
    only = (lambda path, *_: str(path).endswith("data.partial")) if call != "fsync" else is_folder
    monkeypatch.setattr(os, call, failing(call, getattr(errno, name), only=only))
    done = in_process("data", "split", "-r", recipe_file, "-b", build)
    assert done.returncode == 4, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert expected.partition("; ")[0].replace(".*", "") in line
    assert expected.rpartition("; ")[2].removesuffix(" are free in").removeprefix(".*") in line
    assert not (build / "small" / "data").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE])
def test_disk_fault_outside_the_stages_is_exit_4(recipe_file, tmp_path, monkeypatch, number):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "page.html"))

    from tutor.pipeline import runner

    monkeypatch.setattr(runner, "inspect", broken)
    done = in_process("status", "-r", recipe_file, "-b", tmp_path / "build")
    assert done.returncode == 4
    assert done.stderr.startswith(f"Error: {tmp_path}/page.html: {os.strerror(number)}; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_manifest_that_cannot_be_read_is_not_damaged(recipe_file, tmp_path, monkeypatch, number):
    """Another user's folder is not made again, nor one on a network disk that is gone."""
    where = ("-r", recipe_file, "-b", tmp_path / "build")
    assert in_process("data", "split", *where).returncode == 0
    plain = io.open

    def opened(path: Any, *given: Any, **options: Any) -> Any:
        if str(path).endswith("data/manifest.json"):
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *given, **options)

    monkeypatch.setattr(io, "open", opened)
    for command in (("status",), ("run", "--until", "data")):
        done = in_process(*command, *where)
        assert done.returncode == 4, done.stderr
        assert f"data/manifest.json: {os.strerror(number)}; " in done.stderr
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "build" / "small").iterdir() if path.is_dir()) == ["data"]


@pytest.mark.parametrize("length", [4070, 4085, 4094])
def test_path_too_long_for_the_disk_is_exit_2_or_4(recipe_file, tmp_path, length):
    """A path has 4095 bytes at most: the build folder's fits, and those of its files do not."""
    left = length - len(str(tmp_path).encode()) - 1
    deep = tmp_path / "/".join(["n" * 199] * (left // 200) + ["n" * (left % 200)])
    done = in_process("data", "split", "-r", recipe_file, "-b", deep)
    assert done.returncode in (2, 4), done.stderr
    assert "File name too long" in done.stderr


def test_host_fault_ignores_errors_of_other_causes(tmp_path):
    refused = OSError(errno.ECONNREFUSED, "Connection refused")
    invalid = OSError(errno.EINVAL, "Invalid argument")  # a socket's, without a file
    assert (
        host_fault(refused, tmp_path) is host_fault(invalid, tmp_path) is host_fault(ValueError("x"), tmp_path) is None
    )
    named = host_fault(OSError(errno.EINVAL, "Invalid argument", "C:?"), tmp_path)
    assert isinstance(named, HostError)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_build_folder_removed_during_a_stage_is_exit_5(recipe_file, tmp_path, monkeypatch, level):
    """The next run makes all again."""
    from tutor.pipeline.registry import Stage

    build = tmp_path / "build"

    def tidy(recipe: Any, inputs: Any, out: Path) -> dict[str, Any]:
        shutil.rmtree([build, build / "small", out][level])
        (out / "train.jsonl").write_text("rows")
        return {}

    monkeypatch.setattr(Stage, "module", SimpleNamespace(run=tidy))
    where = ("-r", recipe_file, "-b", build)
    done = in_process("data", "split", *where)
    assert done.returncode == 5, done.stderr
    assert "data.partial was removed while it was written; run again" in done.stderr
    monkeypatch.undo()
    assert in_process("data", "split", *where).returncode == 0
