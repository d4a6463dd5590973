"""Find work that hangs in native code, where no signal and no exception reaches it.

In: begin and end of pieces of work that take about equally long, such as training steps. Out: an error, raised in a
thread of its own, which the command line prints before it ends the process (cli/exit.py). Ends nothing itself.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

FLOOR = 600.0
"""Minimum seconds after which a piece hangs."""
FACTOR = 20.0
"""Minimum time after which a piece hangs, as a multiple of the median of the pieces before."""
TICK = 5.0
"""Seconds between two looks at the work."""
PIECES = 101
"""Number of last pieces that the median is taken of."""


class Watchdog:
    """Raises the error `hangs(seconds, median)` in its thread when a piece of work takes too long.

    Time is counted in ticks of that thread: the time in which the machine is suspended, or the process stopped or
    paused (Ctrl-Z, docker pause), does not count. The first piece has no limit.
    """

    def __init__(self, hangs: Callable[[float, float], Exception]) -> None:
        self._hangs = hangs
        self._seconds: deque[float] = deque(maxlen=PIECES)
        self._began: float | None = None  # of the running piece, on the monotonic clock
        self._waited = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def begin(self) -> None:
        """Note the begin of a piece."""
        self._waited, self._began = 0.0, time.monotonic()

    def end(self) -> None:
        """Note the end of the piece."""
        if self._began is not None:
            self._seconds.append(time.monotonic() - self._began)
        self._began = None

    def tick(self, seconds: float) -> None:
        """Count seconds of the running piece. Raises the error when it has taken too long."""
        if self._began is None or not self._seconds:
            return
        self._waited += seconds
        median = statistics.median(self._seconds)
        if self._waited >= max(FLOOR, FACTOR * median):
            raise self._hangs(self._waited, median)

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            self.tick(TICK)
