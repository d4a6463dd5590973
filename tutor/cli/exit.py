"""The one place where an error becomes a line on stderr and an exit code. Knows no command."""

import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import click

from tutor.errors import HostError, TutorError
from tutor.machine import distributed

FIRST = 5.0
"""Seconds that the first of several processes has for its line, before the others say theirs: the launcher ends them
when it fails, and the same fault is one line."""


def main(command: click.Command, name: str) -> NoReturn:
    """Run a console script's command, turn what it raises into one line, and exit with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    # UTF-8 whatever the locale says; a file name that is not is shown escaped, as JSON escapes it.
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or os.environ.get("TUTOR_DEBUG", "") not in ("", "0", "false")
    if not debug:
        sys.excepthook = _bug
    try:
        code = _run(command, name, arguments, debug=debug)
    except BrokenPipeError:
        # `tutor ... | head` closed the pipe: nobody reads on, and nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _run(command: click.Command, name: str, arguments: list[str], *, debug: bool) -> int:
    """Run a command; its exit code. Raises BrokenPipeError, and whatever is a bug."""
    as_json = "--json" in arguments
    stdout = sys.stdout
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        return fail(error.format_message(), 2, _command_help(error), as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.startswith("tutor"):
            raise
        return fail(f"the package {error.name} is not installed", HostError.code, "make install", as_json=as_json)
    except TutorError as error:
        if debug:
            traceback.print_exc()
        return fail(error.message, error.code, error.hint, as_json=as_json, problems=getattr(error, "problems", ()))
    except SystemExit:
        if sys.stdout is not stdout:  # click met a closed pipe: it wraps stdout, and would exit 1
            raise BrokenPipeError from None
        raise
    return code if isinstance(code, int) else 0


def fail(message: str, code: int, hint: str | None, *, as_json: bool, problems: Sequence[str] = ()) -> int:
    """Say what went wrong, on stderr and as JSON on stdout where asked; `code` again."""
    _after_the_first()
    if as_json:
        click.echo(
            json.dumps(
                {"ok": False, "code": code, "error": message, "hint": hint, "problems": list(problems)},
                ensure_ascii=False,
            )
        )
    click.echo(f"Error: {_plain(f'{message}; {hint}' if hint else message)}", err=True)
    for problem in problems:
        click.echo(f"  {_plain(problem)}", err=True)
    return code


def _after_the_first() -> None:
    if not distributed.is_main_process():
        time.sleep(FIRST)


def _plain(text: str) -> str:
    """One line without control characters, whatever a file's name or content brought into the message."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _command_help(error: click.UsageError) -> str | None:
    return f"see {error.ctx.command_path} --help" if error.ctx else None


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM: leave through every cleanup, with the shell's code for it."""
    del frame
    sys.exit(128 + signum)


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _after_the_first()
    place = ""
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    line = f"a bug of tutor's: {kind.__name__}: {error} ({place}); tutor --debug shows all, report it"
    click.echo(f"Error: {_plain(line)}", err=True)
