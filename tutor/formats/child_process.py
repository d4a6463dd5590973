"""A program that this process starts: a signal that ends this process never leaves it running.

In: how to start it and how to stop it. Out: the running program, stopped when the block ends. Knows no program.
"""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import AnyStr


@contextlib.contextmanager
def running(
    start: Callable[[], subprocess.Popen[AnyStr]], stop: Callable[[subprocess.Popen[AnyStr]], object]
) -> Iterator[subprocess.Popen[AnyStr]]:
    """Return the program that `start` starts; `stop` is called when the block ends, whatever ends it."""
    with contextlib.ExitStack() as stack:
        with _signals_held():  # between its start and `callback` an exception would forget it
            process = start()
            stack.callback(stop, process)
        yield process


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let the signals that have handlers wait until the block has ended; only the main thread receives any.

    Handlers wait, the signals are not blocked: a started program would inherit a block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received in held:
            signal.raise_signal(received)
