"""The set-up in order: virtual environment, installer, packages, with llama.cpp built beside them.

In: arguments of scripts/install.py. Out: .venv, a marker for each set, and links to llama.cpp and TypeScript in it.
What is complete is left alone, so that a set-up which was cut off continues where it was.
"""

import argparse
import errno
import fcntl
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from environment import installers
from environment.faults import AGAIN, HOST, LOCKED, SetupError, explain
from environment.jobs import Job, JobError, Jobs
from environment.output import Display, PipReader, Reader, ToolReader, UvReader
from environment.state import INSTALLED, PIP_SPACE, SETS, SPACE, TITLES, Environment, free_space, refuse_small_disk

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end the set-up as Ctrl-C does, with exit code 128 + number: a stop, a closed terminal."""
TOOLS = {"llamacpp": ("llama.cpp", "build_llamacpp.py"), "typescript": ("TypeScript", "install_typescript.py")}
"""Programs that the demo needs beside packages: link in .venv -> name, script."""


class TerminatedError(Exception):
    """The set-up has received one of ENDING_SIGNALS."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def run(arguments: list[str]) -> int:
    """Install a set; return the exit code. An error is one line on stderr."""
    parser = argparse.ArgumentParser(prog="install.py", description="Make or update .venv.")
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--installer", choices=("uv", "pip"), default="uv")
    options = parser.parse_args(arguments)
    display = Display(sys.stderr)
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    try:
        with Path(__file__).open("rb") as lock:
            _lock(lock.fileno())
            Setup(options.set, options.installer, display).run()
    except SetupError as error:
        display.line(f"Error: {error}")
        return error.code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        display.line(f"Error: the disk is full: {error.filename or ROOT}; delete something; {AGAIN}")
        return HOST
    except (KeyboardInterrupt, TerminatedError) as error:
        display.line(f"interrupted; {AGAIN}")
        return error.code if isinstance(error, TerminatedError) else 128 + signal.SIGINT
    return 0


def _terminate(number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal sends it twice
    raise TerminatedError(number)


def _lock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SetupError("another make installs into .venv", "wait for its end", LOCKED) from None


def _has_module(name: str) -> bool:
    """Return whether a module is there; a folder without code, which a removed package can leave, is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


class Setup:
    """One run of the set-up."""

    def __init__(self, name: str, installer: str, display: Display) -> None:
        self.name, self.installer, self.display = name, installer, display
        self.environment = Environment(ROOT)
        self.jobs = Jobs(display)
        self.pip_env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.uv_env: dict[str, str] = {}

    def run(self) -> None:
        """Bring the set up to date, for the demo with its two tools."""
        began = time.monotonic()
        with self.jobs.ended_together():
            try:
                worked = self._run()
            except JobError as error:
                raise self._explain(error.job, error.code) from None
        if worked:
            self.display.line(f"ready in {round(time.monotonic() - began)} s")

    def _run(self) -> bool:
        worked = self._with_tools() if self.name == "demo" else self._packages(self.name)
        self.environment.confirm(self.name)
        return worked

    def _with_tools(self) -> bool:
        """Install the demo's packages while llama.cpp is built, then TypeScript; return whether anything was new."""
        worked = self._packages("build")
        for link in TOOLS:  # without its link a tool counts as missing, for Make too
            (self.environment.folder / link).unlink(missing_ok=True)
        tools = [self._tool("llamacpp")]
        worked = self._packages("demo") or worked
        tools.append(self._tool("typescript"))
        for link, job in zip(TOOLS, tools, strict=True):
            self.jobs.wait(job)
            (self.environment.folder / link).symlink_to(job.spoken()[-1])
            if len(job.spoken()) > 1:
                worked = True
                self.display.line(f"{job.name}: ready in {job.seconds} s")
        return worked

    def _packages(self, name: str) -> bool:
        """Install a set of packages unless it is installed; return whether it was not."""
        environment = self.environment
        if environment.has(name):
            return False
        self._virtual_environment()
        self._refuse_small_disk(SPACE[self.name])  # of the whole set-up, before its first part
        again = environment.begin(name)
        pins = environment.parts(name)
        uv = environment.uv if self.installer == "uv" else None
        reader: UvReader | PipReader
        if uv:
            command, reader = installers.uv_install(uv, environment.python, pins, again=again), UvReader()
        else:
            command = installers.pip_install(environment.python, pins, again=again)
            text = "\n".join(path.read_text("utf-8") for path in pins)
            reader = PipReader(len({line.split()[0] for line in text.splitlines() if "==" in line}))
        job = self._do(TITLES[name], command, reader)
        if name != "lock":
            self._do("tutor", installers.checkout_install(uv, environment.python, ROOT), ToolReader())
        environment.finish(name)
        self.display.line(f"{TITLES[name]}: {reader.summary()} in {job.seconds} s")
        return True

    def _virtual_environment(self) -> None:
        """Make the virtual environment and bring uv into it, unless both are there."""
        environment, pin = self.environment, self.environment.key("lock")
        found = environment.installer()
        if found is None:
            if not all(map(_has_module, ("venv", "ensurepip"))):
                package = f"python3.{sys.version_info.minor}-venv"
                raise SetupError(
                    f"{sys.executable} cannot make virtual environments: it has no venv or no ensurepip",
                    f"install it, on Debian: apt-get install {package}",
                )
            environment.clear()
            self._do("virtual environment", [sys.executable, "-m", "venv", str(environment.folder)], ToolReader())
            (environment.folder / INSTALLED).write_text("pip", "utf-8")
        self._configure()
        if self.installer == "uv" and found != pin:
            pins = environment.pins("lock")
            command = installers.pip_install(environment.python, pins, again=bool(found))
            self._do("uv", command, ToolReader())
            (environment.folder / INSTALLED).write_text(pin, "utf-8")

    def _configure(self) -> None:
        """Let all installers use the certificates, and uv the index, that pip is configured with."""
        python = self.environment.python
        self.pip_env = installers.trusting_environment(python, self.pip_env)
        self.uv_env = installers.uv_environment(installers.pip_configuration(python, self.pip_env), self.pip_env)

    def _do(self, title: str, command: list[str], reader: Reader) -> Job:
        """Run a program to its end, with its lines in a log."""
        env = self.uv_env if command[0] == str(self.environment.uv) else self.pip_env
        job = self._start(title, command, reader, env)
        self.jobs.wait(job)
        return job

    def _start(self, title: str, command: list[str], reader: Reader, env: Mapping[str, str]) -> Job:
        log = self.environment.folder / f"{title.replace(' ', '-').lower()}.log"
        return self.jobs.start(lambda: Job(title, command, reader, log, env, ROOT))

    def _tool(self, link: str) -> Job:
        """Start the script that brings a tool into the user's cache."""
        title, script = TOOLS[link]
        return self._start(title, [str(self.environment.python), f"scripts/{script}"], ToolReader(), self.pip_env)

    def _folders(self) -> tuple[Path, ...]:
        """Return the folders that installing fills."""
        if self.installer == "pip" or not self.environment.uv.exists():
            return (self.environment.folder,)
        return (self.environment.folder, installers.uv_cache(self.environment.uv, self.uv_env))

    def _refuse_small_disk(self, need: float) -> None:
        refuse_small_disk(need * (PIP_SPACE if self.installer == "pip" else 1), self._folders())

    def _explain(self, job: Job, code: int) -> SetupError:
        """Return the error of a failed program: a script's own line, or what the output of an installer means."""
        spoken = [line.removeprefix("Error: ") for line in job.lines if line.startswith("Error: ")]
        if spoken and job.name in [title for title, _ in TOOLS.values()]:
            return SetupError(spoken[-1], AGAIN, code)
        return explain(f"install {job.name}", job.lines, str(job.log), free_space(self._folders()))
