"""Progress on stderr while stages run: one live bar a stage at a terminal, plain log lines elsewhere.

In: records of the logger `tutor`. A record can carry `stage`, `stage_done`, and `done` with `total`, which move the
bar; a record with `live` updates the bar and is left out of plain lines. Stages log, and never print.
"""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

from tutor.formats import terminal
from tutor.formats.visible import one_line

PLAIN_EVERY = 2.0
"""Minimum seconds between two counted lines without a terminal."""


@contextlib.contextmanager
def log_on_stderr(*, quiet: bool = False) -> Iterator[None]:
    """Show the log of `tutor` on stderr inside the context; only warnings when quiet."""
    logger = logging.getLogger("tutor")
    live = terminal.is_terminal("stderr") and not quiet
    handler: logging.Handler = _Bars() if live else _Lines()
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()


@contextlib.contextmanager
def log_discarded() -> Iterator[None]:
    """Discard the log of `tutor` inside the context: another process prints it."""
    logger = logging.getLogger("tutor")
    handler, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


class _Lines(logging.Handler):
    """Write one line a message; counted messages at most every PLAIN_EVERY seconds, and always the last one."""

    def __init__(self) -> None:
        super().__init__()
        self._stage = ""
        self._began = time.monotonic()
        self._last = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if stage := getattr(record, "stage", None):
            self._stage, self._began = stage, time.monotonic()
        done, total = getattr(record, "done", None), getattr(record, "total", None)
        now = time.monotonic()
        if getattr(record, "live", False):
            return
        if done is not None and done != total and now - self._last < PLAIN_EVERY:
            return
        self._last = now
        text = record.getMessage()
        if getattr(record, "stage_done", None):
            text = f"{text} in {now - self._began:.0f} s"
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        prefix = f"{self._stage}: " if self._stage and not text.startswith(f"{self._stage}:") else ""
        terminal.write_note(f"{prefix}{warning}{text}")


class _Bars(logging.Handler):
    """Draw one live line for the running stage, which stays with its time when the stage is done.

    rich is imported for the first message: a run with nothing to do has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Any = None
        self._task: Any = None

    def _start(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.fields[stage]:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.description}[/]"),
            console=terminal.console("stderr"),
        )
        self._progress.start()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone: the run goes on
            self._show(record)

    def _show(self, record: logging.LogRecord) -> None:
        from rich.markup import escape

        if self._progress is None:
            self._start()
        text = escape(one_line(record.getMessage()))
        if stage := getattr(record, "stage", None):
            self._task = self._progress.add_task(text.partition(": ")[2], total=None, stage=stage)
        elif record.levelno >= logging.WARNING or self._task is None:
            self._progress.console.print(f"[yellow]warning:[/] {text}" if record.levelno >= logging.WARNING else text)
        elif getattr(record, "stage_done", None):
            self._progress.update(self._task, total=1, completed=1)
            self._task = None
        else:
            self._progress.update(self._task, description=text)
            if (total := getattr(record, "total", None)) is not None:
                self._progress.update(self._task, total=total, completed=getattr(record, "done", 0))

    def close(self) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.stop()
        super().close()


def quiet_libraries() -> None:
    """Switch off the progress bars and warnings of libraries. Call this before torch is imported."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
