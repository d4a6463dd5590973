"""Exit codes: run a command, and turn what it raises into one line on stderr and a code.

In: a click command, sys.argv. Out: the process ends; with --json an error is also an object on stdout. Other modules
raise TutorError and never exit. Independent of single commands.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import click

from tutor.errors import HostError, TutorError
from tutor.formats import terminal
from tutor.machine import distributed

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a command through its cleanups: a stop, a closed terminal, Ctrl-\\ (which saves no checkpoint)."""
MAIN_PROCESS_SECONDS = 5.0
"""Head start of rank 0 for its error line, in seconds: the launcher then ends the other ranks before they print it
again."""


def run_and_exit(command: click.Command, name: str) -> NoReturn:
    """Run the command of a console script, print what it raises as one line, and exit with its code."""
    terminal.end_by_signals(ENDING_SIGNALS)
    terminal.clean_streams()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or os.environ.get("TUTOR_DEBUG", "") not in ("", "0", "false")
    sys.excepthook = partial(_bug, debug=debug, as_json="--json" in arguments)
    threading.excepthook = partial(_end_from_thread, as_json="--json" in arguments)
    try:
        code = _run(command, name, arguments, debug=debug)
    except BrokenPipeError:
        # `tutor ... | head` closed the pipe: no reader is left, and nothing is wrong.
        code = 141
    terminal.drop_closed_streams()
    sys.exit(code)


def _run(command: click.Command, name: str, arguments: list[str], *, debug: bool) -> int:
    """Run a command and return its exit code. Raises BrokenPipeError, and any exception that is a bug."""
    as_json = "--json" in arguments
    stdout = sys.stdout
    try:
        code = _call(command, name, arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        return print_error(error.format_message().rstrip("."), 2, _command_help(error), as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("tutor"):
            raise
        return print_error(
            f"the package {error.name} is not installed", HostError.code, "make install", as_json=as_json
        )
    except TutorError as error:
        if debug:
            terminal.write_lines(traceback.format_exc().rstrip())
        problems = getattr(error, "problems", ())
        return print_error(error.message, error.code, error.hint, as_json=as_json, problems=problems, stage=error.stage)
    except SystemExit:
        if sys.stdout is not stdout:  # click met a closed pipe: it wraps stdout, and would exit 1
            raise BrokenPipeError from None
        raise
    return code if isinstance(code, int) else 0


def _call(command: click.Command, name: str, arguments: list[str]) -> object:
    """Run a command and return what it returns. Raises HostError for memory that ran out, and for a fault of a disk."""
    try:
        return command.main(arguments, prog_name=name, standalone_mode=False)
    except OSError as error:
        from tutor.artifacts.disk import host_fault

        fault = host_fault(error, Path(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "."))
        if fault is None:
            raise
        raise fault from error
    except (MemoryError, RuntimeError) as error:
        from tutor.machine.device import ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or "Python's"
        raise HostError(f"out of memory: {what}", "end other programs, then run the same command again") from error


def print_error(
    message: str,
    code: int,
    hint: str | None,
    *,
    as_json: bool,
    problems: Sequence[str] = (),
    stage: str | None = None,
) -> int:
    """Print an error on stderr, with `as_json` also as an object on stdout; return `code`.

    `stage` is the stage that was running.
    """
    _wait_for_main_process()
    if as_json:
        error = {"ok": False, "code": code, "stage": stage, "error": message, "hint": hint}
        terminal.write_json({**error, "problems": list(problems)})
    terminal.write_note(f"Error: {f'{message}; {hint}' if hint else message}")
    for problem in problems:
        terminal.write_note(f"  {problem}")
    return code


def _wait_for_main_process() -> None:
    if not distributed.is_main_process():
        time.sleep(MAIN_PROCESS_SECONDS)


def _command_help(error: click.UsageError) -> str | None:
    return f"see {error.ctx.command_path} --help" if error.ctx else None


def _end_from_thread(failed: threading.ExceptHookArgs, *, as_json: bool) -> None:
    """End the process at an error that a thread raises because the main thread hangs (machine/watchdog.py)."""
    error = failed.exc_value
    if not isinstance(error, TutorError):
        threading.__excepthook__(failed)
        return
    terminal.drop_closed_streams()
    logging.shutdown()  # a bar gives the terminal back
    print_error(error.message, error.code, error.hint, as_json=as_json, stage=error.stage)
    os._exit(error.code)


def _bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, *, debug: bool, as_json: bool
) -> None:
    """Print an exception that no command handles: one line, or with `debug` its traceback."""
    if debug:
        terminal.write_lines("".join(traceback.format_exception(kind, error, trace)).rstrip())
        return
    place = ""
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    hint = "tutor --debug shows the traceback; please report it"
    print_error(f"bug in tutor: {kind.__name__}: {error} ({place})", 1, hint, as_json=as_json)
