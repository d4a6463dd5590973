"""A command of the stack whose log cannot be written is ended with its container."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.fakes.docker import Host

from tutor.errors import HostError
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


def test_run_all_makes_its_folder_the_recipes(host: Host, recipe, tmp_path):
    """The services do not compare it: they see the recipe under another path."""
    compose.run_all(recipe, tmp_path / "build")
    assert (tmp_path / "build" / "small" / ".recipe.json").exists()
    shutil.rmtree(tmp_path / "build" / "small" / "logs")
    compose.run_all(recipe, tmp_path / "build")
    assert (tmp_path / "build" / "small" / "logs" / "trainer.log").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root's services run as another user")
def test_run_all_refuses_rows_that_its_services_cannot_read(host: Host, recipe, tmp_path):
    rows = recipe.path.with_name("tutor.jsonl")
    rows.chmod(0o600)
    with pytest.raises(HostError, match=rf"{rows} cannot be read by uid 10001, .*; chmod o\+r"):
        compose.run_all(recipe, tmp_path / "build")
    assert not any(" build " in line for line in host.calls)
    rows.chmod(0o644)
    compose.run_all(recipe, tmp_path / "build")
