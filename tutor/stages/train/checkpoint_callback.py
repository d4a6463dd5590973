"""Save checkpoints during training, and end it early on a signal. In: TRL's trainer. Out: sealed checkpoints.

Checkpoints are saved every few steps (by the trainer), every few minutes, and on a signal: SIGTERM, Ctrl-C and a closed
terminal (SIGHUP) finish the running step, save, and then have their usual effect; a second signal but SIGHUP has it at
once. Out of memory and a full disk become errors with a remedy. Does not write or read a checkpoint's files (the
trainer and checkpoint.py do).
"""

import contextlib
import logging
import re
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from tutor.artifacts.disk import disk_fault
from tutor.errors import HostError, TutorError
from tutor.machine import distributed
from tutor.machine.device import ran_out_of_memory
from tutor.machine.memory.batching import MicroBatches
from tutor.machine.run_cost import checkpoint_bytes
from tutor.stages.train import checkpoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a training after its current step."""
LAUNCHER_SECONDS = 2.0
"""Seconds after a signal in which others are its repetition: at a terminal a launcher passes on what all ranks got."""


GPU_FAILED = re.compile(
    r"CUDA error: (.*(ECC|launch failure|timed out|busy or unavailable|no CUDA-capable|unknown error|lost|hardware"
    r"|NVLink).*)",
    re.IGNORECASE,
)
"""Texts of a RuntimeError for a GPU that failed; other CUDA errors are faults of software."""


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Requests saves from the trainer, and seals each folder that it saved as a checkpoint."""

    def __init__(
        self,
        trainer: Any,
        training: checkpoint.TrainingRun,
        saved: checkpoint.Checkpoint | None,
        minutes: float,
    ) -> None:
        self._trainer = trainer
        self._training = training
        self._before = saved[1] if saved else None
        self._interval = 60 * minutes
        trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
        # An estimate until the first checkpoint exists.
        self._size = checkpoint.size(saved[0]) if saved else checkpoint_bytes(trainable)
        self._start = self._saved_at = time.monotonic()
        self.signal: signal.Signals | None = None  # received by this process
        self.ending: signal.Signals | None = None  # received by any process, known to all

    @property
    def seconds(self) -> float:
        """Training time of this run and of those before."""
        return time.monotonic() - self._start + (self._before.seconds if self._before else 0.0)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: training ends after this step. The next signal ends it at once."""
        del frame
        self.signal = signal.Signals(number)
        with contextlib.suppress(RuntimeError):  # raised when the signal interrupted a write to stderr
            log.warning("%s: ending this step and saving a checkpoint; a second one ends at once", self.signal.name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the disk, and restore the trainer's sum of losses, which it does not save itself."""
        del state, control
        self._require_disk_space()
        if self._before is not None:
            self._trainer._tr_loss = torch.tensor(self._before.loss, device=args.device)
            self._trainer._globalstep_last_logged = self._before.logged
        self._start = self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide whether to save after this step. Raises HostError when the disk has not enough space."""
        del args, state
        if 0 < self._interval <= time.monotonic() - self._saved_at:
            control.should_save = True
        self._decide(control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide again, for a signal that came while the held-out rows were scored."""
        del args, state
        self._decide(control)

    def _decide(self, control: Any) -> None:
        control.should_save = self._gather_signals(save=control.should_save)
        if self.ending:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self._require_disk_space()

    def _gather_signals(self, *, save: bool = False) -> bool:
        """Gather the signals of all ranks; return rank 0's decision to save."""
        gathered = distributed.all_gather((self.signal, save))
        self.ending = next((number for number, _ in gathered if number), None)
        return gathered[0][1]

    def _require_disk_space(self) -> None:
        if distributed.is_main_process():
            checkpoint.require_disk_space(self._training, self._size)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the folder that the trainer wrote."""
        distributed.barrier()  # all ranks write a part
        if distributed.is_main_process():
            self._seal(args, state)
        self._saved_at = time.monotonic()
        self._gather_signals()
        if self.ending:  # the signal came while saving
            control.should_training_stop = True

    def _seal(self, args: Any, state: Any) -> None:
        progress = checkpoint.Progress(
            step=state.global_step,
            steps=state.max_steps,
            seconds=self.seconds,
            loss=float(self._trainer._tr_loss),
            logged=self._trainer._globalstep_last_logged,
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
        )
        self._size = checkpoint.size(checkpoint.seal(self._training, progress))
        log.info("checkpoint of step %d saved", state.global_step)


@contextlib.contextmanager
def saving(
    trainer: Any,
    training: checkpoint.TrainingRun,
    saved: checkpoint.Checkpoint | None,
    minutes: float,
    memory_hint: str,
) -> Iterator[CheckpointCallback]:
    """Let `trainer` save checkpoints inside, also every `minutes` (0: never) and before a signal ends it.

    Raises HostError when the disk is full, or when memory ran out, with `memory_hint` as its hint; the last checkpoint
    stays.
    """
    callback = CheckpointCallback(trainer, training, saved, minutes)
    trainer.add_callback(callback)  # the last one: files that other callbacks write at a step are in its checkpoint
    handlers: dict[int, Any] = {}
    repeated_until = 0.0

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal repeated_until
        if callback.signal is None:
            repeated_until = time.monotonic() + (LAUNCHER_SECONDS if distributed.world_size() > 1 else 0)
            callback.stop(number, frame)
        # SIGHUP: the shell and the kernel both send it when a terminal is closed.
        elif number != signal.SIGHUP and time.monotonic() >= repeated_until:
            restore()
            signal.raise_signal(number)

    # A signal that is ignored stays ignored: Ctrl-C in background jobs of a script, SIGHUP after nohup.
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers |= {number: signal.signal(number, handle) for number in handled}
    try:
        yield callback
    except BaseException as error:
        # Look at the disk before the unfinished checkpoint, which fills it, is removed.
        fault = distributed.is_main_process() and disk_fault(error, training.out)
        fault = fault or memory_fault(error, trainer, memory_hint) or gpu_fault(error, trainer)
        if distributed.is_main_process():
            checkpoint.discard_unfinished(training)
        if fault:
            raise fault from error
        raise
    finally:
        restore()
    if number := callback.ending or callback.signal:
        log.warning("ended after step %d of %d: run the same command again to resume", *_steps(trainer))
        signal.raise_signal(number)


def memory_fault(error: BaseException, trainer: Any, hint: str) -> TutorError | None:
    """Return an error with the step in which memory ran out, or None for another error."""
    if not ran_out_of_memory(error):
        return None
    step, steps = _steps(trainer)
    return HostError(f"out of memory in step {step + 1} of {steps}", hint)


def gpu_fault(error: BaseException, trainer: Any) -> TutorError | None:
    """Return an error with the step in which the GPU failed, or None for another error."""
    if not isinstance(error, RuntimeError) or not (found := GPU_FAILED.search(str(error))):
        return None
    step, steps = _steps(trainer)
    return HostError(
        f"the GPU failed in step {step + 1} of {steps}: {found[1]}",
        "see nvidia-smi and dmesg (Xid, ECC), then run again: it resumes from the last checkpoint",
    )


def memory_hint(batches: MicroBatches) -> str:
    """Return the change of the recipe with which training needs less memory and can resume from its checkpoint."""
    if batches.rows == 1:
        return "free what other programs hold of it, and run again; else train a smaller base, or on shorter rows"
    smaller = batches.rows // 2 if batches.rows % 2 == 0 else 1
    change = (
        f"train.pass_tokens = {batches.tokens // 2}"
        if batches.packed
        else f"train.batch_size = {smaller} and train.accumulation = {batches.step_rows // smaller}"
    )
    return f"set {change}: the same rows a step, and it resumes from the last checkpoint"


def _steps(trainer: Any) -> tuple[int, int]:
    return trainer.state.global_step, trainer.state.max_steps
