"""One process holds a build folder at a time."""

import errno
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes.kills import in_child

from tutor.artifacts.lock import locked
from tutor.errors import ArtifactError, HostError, LockError

HOLD = """
import sys, time
from pathlib import Path
from tutor.artifacts.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(start: Any, tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock of `tmp_path/build`."""
    process: subprocess.Popen[str] = start(sys.executable, "-c", HOLD, tmp_path / "build")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_locked_by_another_process_raises_at_once_with_holder(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s for the lock"))
    with pytest.raises(LockError) as caught, locked(tmp_path / "build"):
        pytest.fail("both have it")
    assert holder.poll() is None
    assert caught.value.code == 7
    assert f"is in use by process {holder.pid} on {platform.node()} since 20" in caught.value.message


def test_locked_after_a_killed_holder_succeeds(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "build"):
        assert json.loads((tmp_path / "build" / ".lock.json").read_text())["pid"] == os.getpid()


def test_locked_frees_the_lock_and_passes_on_an_error(tmp_path):
    for error in (PermissionError(errno.EACCES, "no"), KeyboardInterrupt(), ArtifactError("no")):
        with pytest.raises(type(error)) as caught, locked(tmp_path):
            raise error
        assert caught.value is error
    assert in_child(lambda: locked(tmp_path).__enter__()) == 0


def test_locked_where_no_folder_can_be_made_raises_host_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="Not a directory"), locked(tmp_path / "file" / "build"):
        pytest.fail("locked a file")
