"""When a training saves, and how it ends early. In: TRL's trainer. Out: sealed checkpoints (checkpoint.py).

By steps (the trainer's own), by the clock, and at a signal: SIGTERM and Ctrl-C end the running step, save, and then do
what they always do; a second one does so at once. Out of memory and a full disk become errors that say what to change.
"""

import contextlib
import errno
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
from tutor.machine.memory.batching import MicroBatches
from tutor.machine.run_cost import checkpoint_bytes
from tutor.stages.train import checkpoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
"""What CUDA, cuBLAS and PyTorch's CPU allocator say, in a RuntimeError."""


class Saver(TrainerCallback):  # type: ignore[misc]
    """Asks the trainer to save, and makes what it saved a checkpoint."""

    def __init__(
        self,
        trainer: Any,
        training: checkpoint.Training,
        saved: checkpoint.Saved | None,
        minutes: float,
    ) -> None:
        self._trainer = trainer
        self._training = training
        self._before = saved[1] if saved else None
        self._pause = 60 * minutes
        trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
        # An estimate until the first checkpoint exists.
        self._size = checkpoint.size(saved[0]) if saved else checkpoint_bytes(trainable)
        self._start = self._saved_at = time.monotonic()
        self.signal: signal.Signals | None = None  # that came here
        self.ending: signal.Signals | None = None  # that came to any process, as all of them know

    @property
    def seconds(self) -> float:
        """Of training, in this run and those before it."""
        return time.monotonic() - self._start + (self._before.seconds if self._before else 0.0)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: end after this step. The next one ends at once."""
        del frame
        self.signal = signal.Signals(number)
        with contextlib.suppress(RuntimeError):  # it came while stderr was written to
            log.warning("%s: ending this step and saving a checkpoint; once more ends at once", self.signal.name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a disk without room, and give the trainer its sum of losses back: it starts a new one otherwise."""
        del state, control
        self._require_room()
        if self._before is not None:
            self._trainer._tr_loss = torch.tensor(self._before.loss, device=args.device)
            self._trainer._globalstep_last_logged = self._before.logged
        self._start = self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide whether to save after this step. Raises HostError when the disk has no room for it."""
        del args, state
        if 0 < self._pause <= time.monotonic() - self._saved_at:
            control.should_save = True
        self._decide(control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The same for a signal that came since, while the held-out rows were scored."""
        del args, state
        self._decide(control)

    def _decide(self, control: Any) -> None:
        control.should_save = self._agree(save=control.should_save)
        if self.ending:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self._require_room()

    def _agree(self, *, save: bool = False) -> bool:
        """Hear of every process's signal; whether the first one saves, whose clock counts."""
        told = distributed.all_gather((self.signal, save))
        self.ending = next((number for number, _ in told if number), None)
        return told[0][1]

    def _require_room(self) -> None:
        if distributed.is_main_process():
            checkpoint.require_room(self._training, self._size)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal what the trainer wrote."""
        distributed.barrier()  # until all have written their part
        if distributed.is_main_process():
            self._seal(args, state)
        self._saved_at = time.monotonic()
        self._agree()
        if self.ending:  # it came while saving
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
    training: checkpoint.Training,
    saved: checkpoint.Saved | None,
    minutes: float,
    less_memory: str,
) -> Iterator[Saver]:
    """Let `trainer` save inside: every `minutes` too (0: never), and before a signal ends it.

    Raises HostError when the disk is full, or memory, with `less_memory` as its hint; the last checkpoint stays.
    """
    saver = Saver(trainer, training, saved, minutes)
    trainer.add_callback(saver)  # the last: what the others write at a step is in its checkpoint
    handlers: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        if saver.signal:
            restore()
            signal.raise_signal(number)
        else:
            saver.stop(number, frame)

    # A signal that is ignored, as Ctrl-C is in a script's background jobs, stays so.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers |= {number: signal.signal(number, handle) for number in heard}
    try:
        yield saver
    except BaseException as error:
        # The disk first: what was half saved is what fills it.
        fault = distributed.is_main_process() and disk_fault(error, training.out)
        fault = fault or memory_fault(error, trainer, less_memory)
        if distributed.is_main_process():
            checkpoint.discard_unfinished(training)
        if fault:
            raise fault from error
        raise
    finally:
        restore()
    if number := saver.ending or saver.signal:
        log.warning("ended after step %d of %d: the same command goes on there", *_steps(trainer))
        signal.raise_signal(number)


def memory_fault(error: BaseException, trainer: Any, hint: str) -> TutorError | None:
    """In which step memory ran out, when it did."""
    if not (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    ):
        return None
    step, steps = _steps(trainer)
    return HostError(f"out of memory in step {step + 1} of {steps}", hint)


def less_memory(batches: MicroBatches) -> str:
    """What to change in the recipe when memory ran out, so that training can go on from its checkpoint."""
    if batches.rows == 1:
        return "free what other programs hold of it, and run again; else train a smaller base, or on shorter rows"
    smaller = batches.rows // 2 if batches.rows % 2 == 0 else 1
    change = (
        f"train.pass_tokens = {batches.tokens // 2}"
        if batches.packed
        else f"train.batch_size = {smaller} and train.accumulation = {batches.step_rows // smaller}"
    )
    return f"set {change}: the same rows a step, and it goes on from the last checkpoint"


def _steps(trainer: Any) -> tuple[int, int]:
    return trainer.state.global_step, trainer.state.max_steps
