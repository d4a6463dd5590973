"""Child processes of the set-up: read line by line, shown together, ended together.

In: commands. Out: their lines, in a log each. Does not know what the commands do.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from environment.output import Display, Reader, written_by

TICK = 0.5
"""Seconds between two looks at the running programs."""
GRACE = 5.0
"""Seconds that a program has to end after SIGINT, before it is killed."""


class Job:
    """A running program with its own process group, so that all that it starts can be ended with it."""

    def __init__(
        self, name: str, command: list[str], reader: Reader, log: Path, env: Mapping[str, str], cwd: Path
    ) -> None:
        self.name, self.reader, self.log = name, reader, log
        self.lines: list[str] = []
        self.began = time.monotonic()
        self.ended: float | None = None
        self._rest = b""
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def seconds(self) -> int:
        """Seconds from the start to the end, or until now."""
        return round((self.ended or time.monotonic()) - self.began)

    def fileno(self) -> int:
        """The pipe of the program's output, for select."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def receive(self) -> bool:
        """Read the output that is there; return whether the output has ended."""
        data = os.read(self.fileno(), 65536)
        with contextlib.suppress(OSError):  # a full disk: the program itself reports it
            self._file.write(data)
            self._file.flush()
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole if data else [self._rest]:
            text = line.decode("utf-8", "replace").rstrip()
            self.lines.append(text)
            self.reader.read(text)
        return not data

    def close(self) -> int:
        """Wait for the end of the program; return its exit code."""
        code = self.process.wait()
        self.ended = time.monotonic()
        self._file.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def end(self) -> None:
        """End the program and all that it started, by SIGINT, so that it removes what is not complete."""
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)

    def spoken(self) -> list[str]:
        """Return the lines of output that are not empty."""
        return [line for line in self.lines if line.strip()]

    def text(self) -> str:
        """Return name and progress in words."""
        self.reader.written = written_by(self.process.pid)
        return f"{self.name}: {self.reader.state()}"


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let the signals that have handlers wait until the block has ended; as in tutor/formats/child_process.py."""
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received in held:
            signal.raise_signal(received)


class JobError(Exception):
    """A program that failed; `job` has its lines."""

    def __init__(self, job: Job, code: int) -> None:
        super().__init__(f"{job.name} exited with {code}")
        self.job, self.code = job, code


class Jobs:
    """The programs that run at a time. Where one fails, `wait` raises, and `ended_together` ends the others."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.began = time.monotonic()
        self._running: list[Job] = []
        self._selector = selectors.DefaultSelector()

    def start(self, make: Callable[[], Job]) -> Job:
        """Start a program, show and read it from now on."""
        with _signals_held():  # between its start and `append` an exception would forget it
            job = make()
            self._running.append(job)
        self._selector.register(job, selectors.EVENT_READ)
        return job

    def wait(self, job: Job) -> None:
        """Relay all programs until this one has ended. Raises JobError when any of them fails."""
        while job in self._running:
            for key, _ in self._selector.select(TICK):
                other = key.fileobj
                assert isinstance(other, Job)
                if other.receive():
                    self._finish(other)
            if self._running:
                texts = [other.text() for other in self._running]
                self.display.progress(f"{' | '.join(texts)}, {round(time.monotonic() - self.began)} s")

    def _finish(self, job: Job) -> None:
        self._selector.unregister(job)
        self._running.remove(job)
        if code := job.close():
            raise JobError(job, code)

    @contextlib.contextmanager
    def ended_together(self) -> Iterator[None]:
        """End what still runs when the context ends, whatever ends it."""
        try:
            yield
        finally:
            for job in self._running:
                job.end()
