"""Run `tutor` without paying for its imports each time: in this process, or in a fork of one that has imported them.

Use `in_process` for tests that need no separate process. Use `forked` for signals and kills: a real process with
its own memory and file descriptors, forked from a server that has imported the stages and computed nothing. Console
scripts, start-up and interpreters without torch are tested with real processes (the fixture `tutor` of conftest.py).
"""

import contextlib
import functools
import io
import json
import logging
import multiprocessing
import multiprocessing.context
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tutor.cli.exit import ENDING_SIGNALS

ROOT = Path(__file__).parents[3]
TUTOR = Path(sys.executable).with_name("tutor")
TINY = ROOT / "tests" / "support" / "tiny.toml"
USER_SETTINGS = ("TUTOR_", "PYTHON", "NO_COLOR", "FORCE_COLOR")
"""Prefixes of environment variables that change the output of tutor; tests run without them."""

Done = subprocess.CompletedProcess


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a user who has set no such variable, with `extra` added."""
    return {name: value for name, value in os.environ.items() if not name.startswith(USER_SETTINGS)} | extra


def in_process(
    *arguments: str | Path, env: Mapping[str, str] | None = None, stdin: str = "", cwd: Path = ROOT
) -> "Done[str]":
    """Run `tutor` with these arguments in this process; return its exit code, stdout and stderr."""
    from tutor.cli.main import main

    command = ["tutor", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with _process_state(command, environment(**(env or {})), cwd):
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = ended.code
    return Done(command, int(code or 0), out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _process_state(command: list[str], env: Mapping[str, str], cwd: Path) -> Iterator[None]:
    """Set arguments, environment and folder as for a new process; restore all process state at the end."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (*ENDING_SIGNALS, signal.SIGINT)}
    logger = logging.getLogger("tutor")
    level, propagate = logger.level, logger.propagate
    argv, hook, stdin, place = sys.argv, sys.excepthook, sys.stdin, Path.cwd()
    thread_hook = threading.excepthook
    try:
        _replace_environment(env)
        os.chdir(cwd)
        sys.argv = command
        yield
    finally:
        _replace_environment(before)
        os.chdir(place)
        sys.argv, sys.excepthook, sys.stdin = argv, hook, stdin
        threading.excepthook = thread_hook
        logger.setLevel(level)
        logger.propagate = propagate
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _replace_environment(env: Mapping[str, str]) -> None:
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)


class Forked:
    """A `tutor` process that was forked from the server; what it printed is in two files."""

    def __init__(self, process: BaseProcess, out: Path, err: Path) -> None:
        self.process, self._out, self._err = process, out, err

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until `condition` holds, the process has ended, or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while not condition() and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def finish(self, seconds: float = 200) -> "Done[str]":
        """Wait for the end; return exit code, stdout and stderr. Raises TimeoutError after `seconds`."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self._err.read_text("utf-8"))
        return Done([], self.process.exitcode, self._out.read_text("utf-8"), self._err.read_text("utf-8"))


def console_script() -> None:
    """Run `tutor` as its console script does."""
    from tutor.cli.main import main

    main()


def forked(
    *arguments: str | Path,
    scratch: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    kill: tuple[str, int] = ("", 0),
    entry: Callable[[], None] = console_script,
) -> Forked:
    """Start `tutor` in a fork of the server; `scratch` gets its output and events.json.

    With `kill` = (folder, n) it kills itself (SIGKILL) at its n-th file-system event in the scratch folder of that
    stage folder. events.json counts these events a stage folder, where it ends by itself.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    given = (["tutor", *map(str, arguments)], environment(**(env or {})), cwd, scratch, kill, entry)
    process = _server().Process(target=_child, args=given)
    process.start()
    return Forked(process, scratch / "stdout", scratch / "stderr")


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Return the server, started, with the preloaded module imported: Python skips it silently when not found."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.processes.preloaded"])
    before = dict(os.environ)
    try:
        os.environ["PYTHONPATH"] = str(ROOT / "tests")
        forkserver.ensure_running()
    finally:
        _replace_environment(before)
    process = context.Process(target=_assert_preloaded)
    process.start()
    process.join()
    assert process.exitcode == 0, "support.processes.preloaded was not imported"
    return context


def _assert_preloaded() -> None:
    sys.exit("support.processes.preloaded" not in sys.modules)


def _child(
    command: list[str],
    env: Mapping[str, str],
    cwd: Path,
    scratch: Path,
    kill: tuple[str, int],
    entry: Callable[[], None],
) -> None:
    """Run `tutor` in this forked process, with its output in files."""
    _replace_environment(env)
    if "OMP_NUM_THREADS" in env:  # torch read the server's when it was imported
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    os.chdir(cwd)
    sys.argv = command
    for descriptor, path in ((0, Path(os.devnull)), (1, scratch / "stdout"), (2, scratch / "stderr")):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    events = _Events(*kill)
    sys.addaudithook(events)
    try:
        entry()
    finally:
        (scratch / "events.json").write_text(json.dumps(events.counts), "utf-8")


class _Events:
    """An audit hook that counts file-system events in `*.partial` folders, and kills the process at one of them."""

    CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
    PARTIAL = re.compile(r"([^/]+)\.partial(/|$)")

    def __init__(self, folder: str, number: int) -> None:
        self.kill, self.folder, self.counts = (folder, number), "", Counter[str]()

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and bool(given[2] & (os.O_WRONLY | os.O_RDWR))
        if (writes or event in self.CHANGES) and (found := self.PARTIAL.search(str(given[0]))):
            self.folder = found[1]
        elif event != "subprocess.Popen" or not self.folder:  # a program that the stage starts is an event, too
            return
        self.counts[self.folder] += 1
        if (self.folder, self.counts[self.folder]) == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
