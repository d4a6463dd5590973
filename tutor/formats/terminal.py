"""The terminal: the only module of tutor that writes to stdout and stderr.

In: text of any origin. Out: stdout for results, stderr for progress and errors, without secrets and without characters
that a terminal would obey (visible.py). Does not decide what is printed. Standard library alone, until a bar or a table
needs rich.
"""

import contextlib
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from tutor.formats.visible import PICTURES, clean, json_text, one_line

if TYPE_CHECKING:
    from rich.console import Console

NOTE_LENGTH = 2000
"""Maximum number of characters of a line on stderr."""
_UNFINISHED = re.compile(rf"(?:[{PICTURES}\u200d]+|\r|h(?:f(?:_[A-Za-z0-9]*)?)?)\Z")
"""End of a piece whose meaning the next piece decides: an emoji, a line end, the beginning of a token of the hub."""


def write_result(text: str = "", *, end: str = "\n") -> None:
    """Print a part of a command's result on stdout."""
    _write(sys.stdout, clean(text) + end)


def write_json(value: Any, *, indent: int | None = None) -> None:
    """Print a command's result as one JSON document on stdout."""
    _write(sys.stdout, f"{json_text(value, indent)}\n")


def write_note(text: str) -> None:
    """Print one line on stderr; a line above NOTE_LENGTH loses its middle, for a value in it may be a whole file."""
    line = one_line(text)
    if len(line) > NOTE_LENGTH:
        kept = NOTE_LENGTH // 2
        line = f"{line[:kept]} [... {len(line) - 2 * kept} characters ...] {line[-kept:]}"
    _write_error(f"{line}\n")


def write_lines(text: str) -> None:
    """Print a text of several lines on stderr, such as a traceback."""
    _write_error(f"{clean(text)}\n")


def replace_line(text: str) -> None:
    """Print in place of the last line on stderr, which is a terminal."""
    _write_error(f"\r\033[K{one_line(text)}")


def is_terminal(stream: str) -> bool:
    """Whether `stream`, "stdout" or "stderr", is a terminal."""
    found: TextIO | None = getattr(sys, stream)
    return found is not None and found.isatty()


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # the caller has closed it
        stream.write(text)
        stream.flush()


def _write_error(text: str) -> None:
    """Print on stderr; the text is lost where its reader or terminal is gone, and the run goes on."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, text)


def drop_closed_streams() -> None:
    """Send to /dev/null what is written to stdout and stderr from now on, where their reader or terminal is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or none with a descriptor
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):  # without events that are asked for it reports only errors and hang-ups
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_by_signals(numbers: Iterable[signal.Signals]) -> dict[signal.Signals, Any]:
    """Let signals end the process through its cleanups with exit code 128 + number; return the handlers before.

    A signal that is ignored stays ignored: nohup ignores SIGHUP.
    """
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _end) for number in handled}


@contextlib.contextmanager
def ending_by_signals(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Let signals end the block as `end_by_signals`; the handlers before are back after it."""
    before = end_by_signals(numbers)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    # Of a closed terminal both the shell and the kernel send it: the second one must not interrupt a cleanup.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    drop_closed_streams()
    sys.exit(128 + number)


class AnswerStream:
    """Prints an answer while it is generated, on stdout; a newline releases what the last piece left undecided."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._held = ""
        self._write = write or _write_piece

    def write(self, piece: str) -> None:
        """Print a piece of the answer."""
        text = self._held + piece
        found = _UNFINISHED.search(text)
        end = found.start() if found else len(text)
        self._held = text[end:]
        if end:
            self._write(text[:end])


def _write_piece(text: str) -> None:
    write_result(text, end="")


class ThoughtStream:
    """Prints a thought on stderr while it is generated: dim on a terminal, else as notes, one a line."""

    def __init__(self) -> None:
        self._line = ""  # that is not complete yet, where stderr is no terminal
        self._open = False
        self._console = console("stderr") if is_terminal("stderr") else None
        self._dim = AnswerStream(self._write_dim)

    def write(self, piece: str) -> None:
        """Print a piece of the thought."""
        self._open = True
        if self._console:
            self._dim.write(piece)
            return
        *lines, self._line = (self._line + piece).split("\n")
        for line in lines:
            write_note(line)

    def close(self) -> None:
        """End the thought, if there was one, with its line."""
        if self._open:
            self.write("\n")
        self._open, self._line = False, ""

    def _write_dim(self, text: str) -> None:
        if self._console:
            self._console.print(text, style="dim", end="", markup=False, highlight=False, soft_wrap=True)


class CleanStream:
    """A stream that cleans what libraries write to it: warnings, tracebacks, messages of servers."""

    def __init__(self, stream: TextIO) -> None:
        self.uncleaned = stream

    def write(self, text: str) -> int:
        """Write the text, cleaned; return its length."""
        self.uncleaned.write(clean(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, cleaned."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.uncleaned, name)


def clean_streams() -> None:
    """Make the standard streams UTF-8 in every locale, and clean what libraries write to stderr."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = CleanStream(sys.stderr)


def console(stream: str) -> "Console":
    """Return rich's console on "stdout" or "stderr", which writes its own control codes and escapes those of texts."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(clean(segment.text), segment.style)

    found: Any = getattr(sys, stream)
    return CleanConsole(file=getattr(found, "uncleaned", found))
