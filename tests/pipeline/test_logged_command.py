"""A command of the stack whose log, or whose terminal, cannot be written is ended with its container."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.fakes.docker import Host
from support.processes.command import ROOT
from support.processes.waiting import wait_for

from tutor.pipeline import compose, logged_command
from tutor.pipeline.logged_command import LogError, run_logged
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe

TALKS = "import sys, time\nwhile True:\n    print('step', file=sys.stderr, flush=True)\n    time.sleep(0.05)"
"""A program that logs a line now and then, and never ends."""


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


def spoil(path: Path, how: str) -> None:
    """Make a log that cannot be written: /dev/full is a disk without room."""
    path.parent.mkdir(parents=True)
    if how == "full disk":
        path.symlink_to("/dev/full")
    elif how == "folder":
        path.mkdir()
    else:
        path.parent.rmdir()
        path.parent.write_text("not a folder")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("full disk", r"trainer\.log: No space left on device; .* GB are free in .*logs"),
        ("folder", r"trainer\.log: Is a directory"),
        ("file", r"trainer\.log: File exists"),
    ],
)
def test_run_logged_without_a_log_ends_its_command(tmp_path, monkeypatch, how, message):
    started = []

    def remember(*given, **options):
        started.append(plain(*given, **options))
        return started[-1]

    plain = subprocess.Popen
    monkeypatch.setattr(logged_command.subprocess, "Popen", remember)
    log = tmp_path / "logs" / "trainer.log"
    spoil(log, how)
    with pytest.raises(LogError, match=message) as caught:
        run_logged("trainer", [sys.executable, "-c", TALKS], os.environ, log)
    assert caught.value.code == 4
    assert [process.poll() for process in started] == ([-signal.SIGTERM] if how == "full disk" else [])


def test_run_logged_makes_a_removed_log_folder_again(tmp_path):
    log = tmp_path / "logs" / "trainer.log"
    code = "import shutil, sys; shutil.rmtree(sys.argv[1]); print('late', file=sys.stderr); print('{}')"
    assert run_logged("trainer", [sys.executable, "-c", code, str(log.parent)], os.environ, log) == "{}\n"
    assert not log.parent.exists()  # removed while it was written: the command goes on
    assert run_logged("merger", [sys.executable, "-c", "print('{}')"], os.environ, log) == "{}\n"
    assert log.read_text() == "{}\n"


def test_run_all_with_a_full_disk_stops_the_container(host: Host, recipe, tmp_path):
    host.answer("--name tutor-trainer", seconds=60, stderr="training\n")
    spoil(tmp_path / "build" / "small" / "logs" / "trainer.log", "full disk")
    with pytest.raises(LogError, match="No space left on device"):
        compose.run_all(recipe, tmp_path / "build")
    container = f"tutor-trainer-{os.getpid()}"
    assert host.calls[-2:] == [f"docker stop --time 180 {container}", f"docker rm --force {container}"]


def test_run_all_with_a_closed_terminal_stops_the_container(host: Host, recipe, tmp_path):
    """`make all 2>&1 | head` closes both."""
    host.answer("--name tutor-trainer", seconds=60, stderr="training\n" * 20_000)
    code = (
        "import pathlib, sys\nfrom tutor.cli.progress import log_on_stderr\nfrom tutor.pipeline import compose\n"
        "from tutor.recipe.reading import read_recipe\nwith log_on_stderr():\n"
        "    compose.run_all(read_recipe(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))"
    )
    where = [str(recipe.path), str(tmp_path / "build")]
    with subprocess.Popen([sys.executable, "-c", code, *where], cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(b"training" in line for line in process.stderr)
        process.stderr.close()  # more was written than the pipe holds
        process.wait(20)
    wait_for(lambda: host.calls[-1] == f"docker rm --force tutor-trainer-{process.pid}")


def test_run_all_makes_its_folder_the_recipes(host: Host, recipe, tmp_path):
    """The services do not compare it: they see the recipe under another path."""
    compose.run_all(recipe, tmp_path / "build")
    assert (tmp_path / "build" / "small" / ".recipe.json").exists()
    shutil.rmtree(tmp_path / "build" / "small" / "logs")
    compose.run_all(recipe, tmp_path / "build")
    assert (tmp_path / "build" / "small" / "logs" / "trainer.log").exists()
