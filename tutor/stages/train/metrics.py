"""Speed and memory of a training, for log lines, metrics.jsonl and TensorBoard; other trackers of transformers.

In: steps as they end, a clock, the device. Out: numbers and their text; reports to trackers. Does not decide anything.
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
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from tutor.errors import ServiceError

log = logging.getLogger(__name__)


class Pace:
    """Measures the speed of training steps, without the time of evaluations."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._evaluations: list[float] = []
        self.begin(0, 0.0)

    def begin(self, step: int, epoch: float) -> None:
        """Start the clock at the given step, which is not 0 in a resumed training."""
        self._began = self._reported = self._now()
        self._first = self._step = step
        self._first_epoch = self._epoch = epoch
        self._paused = 0.0  # seconds of evaluations since the last report

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of an evaluation."""
        began = self._now()
        yield
        self._evaluations.append(self._now() - began)
        self._paused += self._evaluations[-1]

    def elapsed(self, epoch: float) -> tuple[float, float]:
        """Return the seconds since the start, without evaluations, and the epochs that were trained in them."""
        seconds = self._now() - self._began - math.fsum(self._evaluations)
        return max(seconds, 1e-9), epoch - self._first_epoch

    def seconds_left(self, step: int, steps: int, evaluations: int) -> float:
        """Return the seconds to the end, estimated from the mean speed."""
        scoring = math.fsum(self._evaluations) / max(len(self._evaluations), 1)
        return (steps - step) * self.elapsed(0)[0] / max(step - self._first, 1) + evaluations * scoring

    def since_report(self, step: int, epoch: float, rows: int, tokens: int) -> dict[str, float]:
        """Return the speeds since the last call."""
        now = self._now()
        seconds = max(now - self._reported - self._paused, 1e-9)
        done, epochs = step - self._step, epoch - self._epoch
        self._reported, self._step, self._epoch, self._paused = now, step, epoch, 0.0
        return {
            "seconds": round(now - self._began, 2),
            "steps_per_second": round(done / seconds, 4),
            "samples_per_second": round(epochs * rows / seconds, 3),
            "tokens_per_second": round(epochs * tokens / seconds, 1),
        }


def gpu_utilization() -> int | None:
    """Return the GPU's current utilization in percent; None without a GPU or without its library."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        return int(torch.cuda.utilization())
    except ImportError:
        return None
    except (RuntimeError, pynvml.NVMLError):  # no permission, in some containers
        return None


def resources(utilization: Sequence[int]) -> dict[str, float]:
    """Return the peak memory in GB of this process and of the GPU, and the GPU's mean utilization in percent."""
    found = {"memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)}
    if torch.cuda.is_available():
        found["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if utilization:
        found["gpu_utilization"] = round(sum(utilization) / len(utilization), 1)
    return found


def report_text(line: Mapping[str, Any]) -> str:
    """Return a report as text, the most important numbers first: a narrow terminal cuts the end off."""
    parts = ["skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"]
    if "held_out_loss" in line:
        parts.append(f"held-out {line['held_out_loss']:.4f} (perplexity {line['held_out_perplexity']:.2f})")
    parts.append(f"{format_duration(line['seconds_left'])} left")
    parts.append(f"{line['samples_per_second']:.2f} samples/s, {line['tokens_per_second']:.0f} tokens/s")
    if "gpu_memory_gb" in line:
        utilization = f" {line['gpu_utilization']:.0f} %," if "gpu_utilization" in line else ""
        parts.append(f"GPU{utilization} {line['gpu_memory_gb']:.1f} GB")
    else:
        parts.append(f"{line['memory_gb']:.1f} GB")
    return ", ".join([*parts, f"lr {line['learning_rate']:.1e}"])


def format_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds or with hours: 3:05, 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def open_tensorboard(folder: Path, step: int) -> Any:
    """Return TensorBoard's writer, which replaces events after `step`; None, and a log line, without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard files: the package tensorboard is not installed")
        return None
    log.info("to view the curves during training: tensorboard --logdir %s", folder)
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def write_scalars(board: Any, line: Mapping[str, Any]) -> None:
    """Write a report's numbers to TensorBoard's files and flush them."""
    if board is None:
        return
    for name, value in line.items():
        if name not in ("step", "epoch", "seconds") and value is not None:
            board.add_scalar(name.replace("held_out_", "held_out/"), value, line["step"])
    board.flush()


class Tracker(TrainerCallback):  # type: ignore[misc]
    """Reports a training to one tracker of transformers, and names it when it fails.

    A tracker that cannot begin is an error. One that fails later gets no more reports, and the training goes on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._callback: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make transformers' own callback, and begin. Raises ServiceError with the tracker's reason."""
        try:
            self._callback = get_reporting_integration_callbacks([self._name])[0]()
            self._callback.on_init_end(args, state, control, **given)
            self._callback.on_train_begin(args, state, control, **given)
        except (Exception, SystemExit) as error:
            raise ServiceError(
                f"{self._name} cannot record this training: {_reason(error)}",
                "see its documentation for its account and environment, or remove it from train.report_to",
            ) from error

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Pass the end of a step on."""
        self._send("on_step_end", args, state, control, given)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Pass the numbers of a step on."""
        self._send("on_log", args, state, control, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Pass the end of the training on."""
        self._send("on_train_end", args, state, control, given)

    def _send(self, event: str, args: Any, state: Any, control: Any, given: Mapping[str, Any]) -> None:
        if self._callback is not None:
            with self:
                getattr(self._callback, event)(args, state, control, **given)

    def __enter__(self) -> None:
        """Begin a report."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """End a report; after a failure the training goes on without this tracker."""
        if not isinstance(error, Exception | SystemExit):
            return False
        log.warning("%s failed and gets no more reports: %s", self._name, _reason(error))
        self._callback = None
        return True


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
