"""Run one command of the stack: its output followed in the log and kept in a file, its failure as an error.

In: a command line, its environment, the path of its log. Out: its stdout, or a StackError or HostError with the last
error that it printed; a log without secrets and control characters. A command whose log cannot be written is ended.
Independent of the service that it runs.
"""

import contextlib
import logging
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tutor.artifacts.disk import host_fault
from tutor.errors import HostError, TutorError
from tutor.formats import terminal
from tutor.formats.child_process import running
from tutor.formats.visible import clean

log = logging.getLogger(__name__)

LAST_LINES = 40
"""Number of last lines of a failed command that are searched for its error."""


class StackError(TutorError):
    """A service that failed, with its exit code."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint)
        self.code = code


class LogError(HostError):
    """A log that cannot be written, and whose command was ended."""


def run_logged(name: str, command: Sequence[str], environment: Mapping[str, str], path: Path) -> str:
    """Run a command with its log in `path`; return its stdout.

    Raises StackError or HostError when it fails, LogError when the log cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may tidy up while a service runs
        with (
            path.open("w", encoding="utf-8") as kept,
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out,
        ):
            code, last = _followed(command, environment, kept, out)
            out.seek(0)
            text = out.read()
            kept.write(clean(text))
    except OSError as error:
        fault = host_fault(error, path)
        message, hint = (fault.message, fault.hint) if fault else (f"{path}: {error.strerror}", None)
        raise LogError(message, hint) from error
    if code:
        raise _failure(name, code, last, path)
    return text


def _followed(
    command: Sequence[str], environment: Mapping[str, str], kept: IO[str], out: IO[str]
) -> tuple[int, list[str]]:
    """Run a command, stderr to the log and `kept`, stdout to `out`; return its exit code and last lines."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    with running(
        lambda: subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C at the terminal goes to this process alone
        ),
        _stop,
    ) as process:
        for line in process.stderr or ():
            kept.write(clean(line))
            kept.flush()
            last.append(line.rstrip())
            log.info("%s", line.rstrip())
        return process.wait(), list(last)


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
    if process.stderr is not None:
        process.stderr.close()


def print_output(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command, print the lines of its output while they come, and return its exit code."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            terminal.write_result(line, end="")
    return process.returncode


def _failure(name: str, code: int, last: Sequence[str], path: Path) -> TutorError:
    """Return the error for an exit code and the last lines."""
    hint = f"its log: {path}"
    lines = [line for line in last if line.strip()]
    error = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1] if lines else "")
    if "could not select device driver" in error:
        return HostError(f"{name}: Docker cannot give the container a GPU", "install the NVIDIA Container Toolkit")
    if code == 125 or name == "build":
        return HostError(f"{name}: {error or 'Docker failed'}", hint)
    if code == 137:
        error = error or "killed: out of memory?"
    error = error.removeprefix("Error: ")
    return StackError(f"{name} ended with exit code {code}{f': {error}' if error else ''}", hint, code)
