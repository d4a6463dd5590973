"""cli/progress.py: plain lines in a log, a bar at a terminal, nothing on stdout."""

import logging
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes.command import TUTOR, environment

from tutor.cli import progress
from tutor.cli.progress import PLAIN_EVERY, log_on_stderr

log = logging.getLogger("tutor.stages.example")

COLOUR = re.compile(r"\x1b\[[0-9;]*[349][0-8][;m]")


@pytest.fixture
def clock(monkeypatch):
    """Clock of the log lines: `now` in seconds, set by the test."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def test_log_lines_carry_the_stage_and_its_time(capsys, clock):
    with log_on_stderr():
        clock.now += 7
        log.info("%s: %s", "train", "train the LoRA adapter", extra={"stage": "train"})
        log.info("12 rows audited")
        clock.now += 42
        log.warning("slow")
        log.info("%s: done", "train", extra={"stage_done": "train"})
    captured = capsys.readouterr()
    assert (
        captured.err
        == "train: train the LoRA adapter\ntrain: 12 rows audited\ntrain: warning: slow\ntrain: done in 42 s\n"
    )
    assert captured.out == ""


def test_counted_messages_are_limited_by_time(capsys, clock):
    """128 messages a second, so that every time is exact in binary; the last message is always printed."""
    with log_on_stderr():
        for done in range(1, 1001):
            log.info("step %d of 1000", done, extra={"done": done, "total": 1000})
            clock.now += 1 / 128
    every = int(128 * PLAIN_EVERY)
    expected = [*range(1, 1001, every), 1000]
    assert capsys.readouterr().err == "".join(f"step {done} of 1000\n" for done in expected)
    assert len(expected) == 5


def test_live_messages_are_left_out_of_plain_lines(capsys):
    with log_on_stderr():
        log.info("step 1 of 9", extra={"done": 1, "total": 9, "live": True})
        log.info("step 2 of 9, and how fast", extra={"done": 2, "total": 9})
    assert capsys.readouterr().err == "step 2 of 9, and how fast\n"


def test_quiet_shows_only_warnings(capsys):
    with log_on_stderr(quiet=True):
        log.info("nothing to see")
        log.warning("look")
    assert capsys.readouterr().err == "warning: look\n"


def test_lines_without_a_reader_are_lost_and_the_run_goes_on(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1, closefd=False) as closed, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", closed)
        with log_on_stderr():
            log.info("step 1 of 9")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    os.close(writer)


def test_logger_is_restored_after_an_error(monkeypatch):
    logger = logging.getLogger("tutor")
    monkeypatch.setattr(logger, "propagate", True)
    before = (logger.level, list(logger.handlers))
    with pytest.raises(ValueError, match="a stage failed"), log_on_stderr():
        raise ValueError("a stage failed")
    assert (logger.level, list(logger.handlers)) == before
    assert logger.propagate


def at_terminal(*command: str | Path, **env: str) -> tuple[int, str]:
    """Run a command whose stderr is a terminal; return its exit status and the text sent to the terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment(**env)) as process:
        os.close(theirs)
        sent = b""
        while select.select([ours], [], [], 30)[0]:
            try:
                sent += os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
    os.close(ours)
    return process.returncode, sent.decode()


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({"TERM": "xterm-256color"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["a terminal", "NO_COLOR", "TERM=dumb"],
)
def test_terminal_shows_a_bar_with_colours_when_allowed(recipe_file, tmp_path, env, coloured):
    status, sent = at_terminal(TUTOR, "data", "split", "-r", recipe_file, "-b", tmp_path / "build", **env)
    assert status == 0
    assert "data" in sent
    assert bool(COLOUR.search(sent)) == coloured
    if env["TERM"] == "dumb":
        assert "\x1b" not in sent


SHOW = """
import logging, sys
from tutor.cli.progress import log_on_stderr
log = logging.getLogger("tutor")
with log_on_stderr():
    log.info("train: [bold]x[/] [/]", extra={"stage": "train"})
    log.info("step 1 [red]", extra={"done": 1, "total": 2})
    log.warning("a [b]name[/b] of a file")
    log.warning("title \\x1b]0;x\\x07 \\x9b2J \\u202e key hf_abcdefghijklmnopqrstuvw")
    log.info("step 2 \\x1b[2J", extra={"done": 2, "total": 2})
    log.info("train: done", extra={"stage_done": "train"})
    log.info("behind the stages")
    log.info("again: and failing", extra={"stage": "again"})
    sys.exit(3)
"""


def test_bar_escapes_markup_and_survives_a_failed_stage():
    status, sent = at_terminal(sys.executable, "-c", SHOW, TERM="xterm", NO_COLOR="1")
    assert status == 3
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    for text in ("[bold]x[/] [/]", "warning: a [b]name[/b] of a file", "✓ train", "behind the stages", "and failing"):
        assert text in plain
    assert r"title \x1b]0;x\x07 \x9b2J \u202e key [redacted]" in plain.replace("\r\n", " ")
    assert r"step 2 \x1b[2J" in plain
    assert not {"\x07", "\x9b", "\u202e"} & set(plain)
    assert sent.rstrip().endswith("\x1b[?25h")  # the cursor is visible again


def test_stderr_without_a_terminal_has_no_control_sequences(tutor, recipe_file, tmp_path):
    done: Any = tutor("data", "split", "-r", recipe_file, "-b", tmp_path / "build", env={"TERM": "xterm-256color"})
    assert done.returncode == 0
    assert re.fullmatch(r"data: check the rows and split them\ndata: done in \d+ s\n", done.stderr)
    assert "\x1b" not in done.stdout
