"""What a person sees while stages run: a live bar a stage at a terminal, plain lines elsewhere. Always on stderr.

Stages only log. A record may carry `stage`, `stage_done`, and `done` with `total`, which move the bar; one that is
`live` is worth a glance while it is true, and no line in a log.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

PLAIN_EVERY = 2.0
"""Seconds between two counted lines where there is no terminal: a log is read later, not watched."""


@contextlib.contextmanager
def shown(*, quiet: bool = False) -> Iterator[None]:
    """Show the log of `tutor` on stderr inside; warnings only when quiet."""
    logger = logging.getLogger("tutor")
    live = sys.stderr.isatty() and not quiet
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
def silenced() -> Iterator[None]:
    """Show nothing of it inside: another process says the same."""
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
    """One line a message; counted messages at most every PLAIN_EVERY seconds, and always the last one."""

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
        sys.stderr.write(f"{prefix}{warning}{text}\n")
        sys.stderr.flush()


class _Bars(logging.Handler):
    """One live line for the running stage; it stays, with its time, when the stage is done."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.fields[stage]:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.description}[/]"),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        from rich.markup import escape

        text = escape(record.getMessage())
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
        self._progress.stop()
        super().close()


def quiet_libraries() -> None:
    """Their bars and warnings stay out of ours: the stages say what matters. Before torch is imported."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
