"""How fast a training goes and what it takes of the machine: for the log's lines, metrics.jsonl and TensorBoard.

In: steps as they end, a clock, the device. Out: figures and sentences. Decides nothing.
"""

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


class Pace:
    """How long steps take, without the time of evaluations."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._evaluations: list[float] = []
        self.begin(0, 0.0)

    def begin(self, step: int, epoch: float) -> None:
        """Training starts, at a step that may not be the first."""
        self._began = self._reported = self._now()
        self._first = self._step = step
        self._first_epoch = self._epoch = epoch
        self._idle = 0.0  # seconds of evaluations since the last report

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """An evaluation."""
        began = self._now()
        yield
        self._evaluations.append(self._now() - began)
        self._idle += self._evaluations[-1]

    def trained(self, epoch: float) -> tuple[float, float]:
        """Seconds since the beginning, without evaluations, and the epochs that they took."""
        seconds = self._now() - self._began - math.fsum(self._evaluations)
        return max(seconds, 1e-9), epoch - self._first_epoch

    def left(self, step: int, steps: int, evaluations: int) -> float:
        """Seconds to the end, at the mean speed so far."""
        scoring = math.fsum(self._evaluations) / max(len(self._evaluations), 1)
        return (steps - step) * self.trained(0)[0] / max(step - self._first, 1) + evaluations * scoring

    def since_report(self, step: int, epoch: float, rows: int, tokens: int) -> dict[str, float]:
        """Speeds since the last time that it was asked."""
        now = self._now()
        seconds = max(now - self._reported - self._idle, 1e-9)
        done, passed = step - self._step, epoch - self._epoch
        self._reported, self._step, self._epoch, self._idle = now, step, epoch, 0.0
        return {
            "seconds": round(now - self._began, 2),
            "steps_per_second": round(done / seconds, 4),
            "samples_per_second": round(passed * rows / seconds, 3),
            "tokens_per_second": round(passed * tokens / seconds, 1),
        }


def gpu_utilization() -> int | None:
    """Percent of the last moment in which the GPU computed; None without one, or without its library."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        return int(torch.cuda.utilization())
    except ImportError:
        return None
    except (RuntimeError, pynvml.NVMLError):  # no right to ask, as in some containers
        return None


def resources(busy: Sequence[int]) -> dict[str, float]:
    """Peak memory in GB of this process, and of the GPU with its mean utilization in percent where there is one."""
    found = {"memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)}
    if torch.cuda.is_available():
        found["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if busy:
        found["gpu_utilization"] = round(sum(busy) / len(busy), 1)
    return found


def sentence(line: Mapping[str, Any]) -> str:
    """A report for people, what matters most first: a narrow terminal cuts its end."""
    parts = ["skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"]
    if "held_out_loss" in line:
        parts.append(f"held-out {line['held_out_loss']:.4f} (perplexity {line['held_out_perplexity']:.2f})")
    parts.append(f"{clock(line['seconds_left'])} left")
    parts.append(f"{line['samples_per_second']:.2f} samples/s, {line['tokens_per_second']:.0f} tokens/s")
    if "gpu_memory_gb" in line:
        busy = f" {line['gpu_utilization']:.0f} %," if "gpu_utilization" in line else ""
        parts.append(f"GPU{busy} {line['gpu_memory_gb']:.1f} GB")
    else:
        parts.append(f"{line['memory_gb']:.1f} GB")
    return ", ".join([*parts, f"lr {line['learning_rate']:.1e}"])


def clock(seconds: float) -> str:
    """Seconds as people read them: 3:05, 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None with one line where the package is missing. It replaces what comes after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard files: the package tensorboard is not installed")
        return None
    log.info("curves while it runs: tensorboard --logdir %s", folder)
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def show(board: Any, line: Mapping[str, Any]) -> None:
    """Give a report's numbers to TensorBoard, seen at once."""
    if board is None:
        return
    for name, value in line.items():
        if name not in ("step", "epoch", "seconds") and value is not None:
            board.add_scalar(name.replace("held_out_", "held_out/"), value, line["step"])
    board.flush()
