"""Waiting in tests: until a condition holds, or a pipe has been read."""

import fcntl
import sys
import termios
import time
from collections.abc import Callable
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
