"""The output of llama.cpp's build: one line of progress, and the error that explains a failure.

In: lines of pip, CMake, Ninja and compilers. Out: lines on stderr; a TutorError. Runs nothing.
"""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tutor.errors import ArtifactError, HostError, TutorError
from tutor.formats import terminal

STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
"""Beginning of a line of Ninja: number of finished steps, number of all steps."""
SECONDS = 5.0
"""Minimum seconds between two lines of progress where they are not overwritten."""
KNOWN = (
    (r"No space left on device|Disk quota exceeded", HostError, "the disk is full", "delete something"),
    (
        r"Killed signal terminated program|out of memory|Cannot allocate memory",
        HostError,
        "a compiler ran out of memory",
        "close other programs",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        HostError,
        "the package index's certificate is not trusted here",
        "name a file with it: PIP_CERT=FILE",
    ),
    (r"DO NOT MATCH THE HASHES", ArtifactError, "the package index serves another file", "try later or another index"),
    (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|onnection broken|onnection reset|name resolution",
        HostError,
        "the package index does not answer",
        "check the network and the proxy",
    ),
)
"""Patterns of known failures, the first that matches counts: pattern, error, what, next step."""


class BuildProgress:
    """Prints how far a build is: in place on a terminal, elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self._in_place = terminal.is_terminal("stderr")
        self._printed = -SECONDS
        self._open = False

    def read(self, line: str) -> None:
        """Print the progress that a line of Ninja states; other lines print nothing."""
        if not (found := STEP.match(line)):
            return
        done, total = int(found[1]), int(found[2])
        if self._in_place:
            terminal.replace_line(f"llama.cpp: {done} of {total}")
            self._open = True
        elif time.monotonic() - self._printed >= SECONDS or done == total:
            terminal.write_note(f"llama.cpp: {done} of {total}")
            self._printed = time.monotonic()

    def end(self) -> None:
        """Remove the line that would be overwritten next."""
        if self._open:
            terminal.replace_line("")
            self._open = False


def explain(what: str, lines: Sequence[str], code: int, log: Path) -> TutorError:
    """The error for a program that has failed with these lines; `log` contains them."""
    text = "".join(lines)
    for pattern, kind, message, hint in KNOWN:
        if re.search(pattern, text):
            return kind(f"cannot {what}: {message}", hint)
    if "No module named pip" in text:
        return HostError(f"cannot {what}: {sys.executable} has no pip", "make install")
    errors = [line.strip() for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    spoken = [line.strip() for line in lines if line.strip()]
    last = next(iter([*errors[-1:], *spoken[-1:]]), f"exit code {code}")
    return ArtifactError(f"cannot {what}: {last}", f"all output: {log}")
