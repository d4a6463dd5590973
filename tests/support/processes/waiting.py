"""Waiting in tests: until a condition holds, or a pipe has been read."""

import fcntl
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until `condition` holds, at most 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def unread(pipe: Any) -> int:
    """Return the number of bytes that the other end of a pipe has not read yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def waits_for_more(process: Any) -> bool:
    """Whether a process has read all of its stdin and waits; a signal between two reads is lost until the next one."""
    state = Path(f"/proc/{process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    return unread(process.stdin) == 0 and state == "S"
