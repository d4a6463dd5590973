"""Run the training with its monitor, keep the best adapter or the last, and write the stage's files.

In: a trainer whose rows are audited. Out: the adapter in PEFT's format, metrics.jsonl and training.svg; their bytes
depend on the training only, not on the time. Does not set the trainer up and does not save checkpoints.
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from tutor.errors import ArtifactError, HostError
from tutor.machine.distributed import full_tensor, is_main_process
from tutor.machine.watchdog import Watchdog
from tutor.prompt.encoding import Encoded
from tutor.stages.train import checkpoint
from tutor.stages.train.held_out_loss import mean_loss, perplexity, refuse_inference_layout
from tutor.stages.train.metrics import Tracker
from tutor.stages.train.monitor import Monitor, MonitorSettings, report_lines, report_lower, restore_best
from tutor.stages.train.plot import draw

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """The result of a training."""

    step: int  # of the adapter that was kept
    loss: float  # held-out loss of the adapter as it is in its file, in FP16
    seconds: float  # training time in this process, without evaluations
    epochs: float  # epochs trained in those seconds


def fit(
    trainer: Any,
    monitoring: MonitorSettings,
    held_out: Sequence[Encoded],
    folder: Path,
    session: AbstractContextManager[object],
    resume: Path | None = None,
) -> FitResult:
    """Train, from the checkpoint `resume` on unless it is None; the model then has the adapter to keep, in FP16.

    `folder` receives the running log. `session` is entered during training: it saves checkpoints and handles signals.
    Raises ArtifactError when training fails, or ends before its last step for another reason than patience.
    """
    model = trainer.model
    refuse_inference_layout(model)
    trainer.remove_callback(PrinterCallback)
    watchdog = Watchdog(lambda seconds, median: hanging_step(trainer, seconds, median))
    trainer.add_callback(StepWatch(watchdog))  # the first one: it ends a step before others evaluate, report and save
    monitor = Monitor(folder, monitoring, lambda: mean_loss(model, held_out))
    trainer.add_callback(monitor)
    for name in monitoring.trackers:
        trainer.add_callback(Tracker(name))
    with contextlib.closing(monitor), session, watchdog:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    state = trainer.state
    if state.global_step != state.max_steps and not monitor.stopped:
        raise ArtifactError(f"training ended at step {state.global_step} of {state.max_steps}")
    kept = None
    if monitoring.keep == "best":
        kept = restore_best(model, Path(trainer.args.output_dir), state.log_history)
    else:
        report_lower(state.log_history)
    round_adapter(model)
    after = mean_loss(model, held_out)
    log.info("held-out loss after training: %.4f (perplexity %.2f)", after, perplexity(after))
    if after > monitoring.loss_before:
        log.warning("training made the held-out loss worse: %.4f, and %.4f before", after, monitoring.loss_before)
    return FitResult(kept or state.global_step, after, *monitor.pace.elapsed(state.epoch))


class StepWatch(TrainerCallback):  # type: ignore[misc]
    """Lets a watchdog watch the steps; evaluations and saves are outside of them."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the begin of a step."""
        del args, state, control
        self._watchdog.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the end of a step."""
        del args, state, control
        self._watchdog.end()


def hanging_step(trainer: Any, seconds: float, median: float) -> HostError:
    """Return the error for a step that has taken `seconds`, and the steps before `median`, without an end."""
    step, steps = trainer.state.global_step, trainer.state.max_steps
    saved = checkpoint.newest_step(Path(trainer.args.output_dir))
    look = "see dmesg and the machine's memory" if trainer.args.use_cpu else "see nvidia-smi and dmesg (Xid, ECC)"
    error = HostError(
        f"step {step + 1} of {steps} hangs: it has taken {seconds:.0f} s, steps before it {median:.1f} s",
        f"{look}, then run again: it resumes {f'after step {saved}' if saved else 'from the beginning'}",
    )
    error.stage = "train"
    return error


def round_adapter(model: Any) -> None:
    """Round the trainable matrices to FP16, so that the final held-out loss is that of the file.

    FP16 halves the file, and is precise enough: it moves the change that the demo's adapter makes by 0.02 %, 1/80 of
    the rounding of the merged FP16 model. DoRA's magnitudes stay in fp32: each scales a row of the base. Raises
    ArtifactError for a value beyond FP16's 65504.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            with torch.no_grad():
                parameter.copy_(parameter.half().float())
            if not torch.isfinite(full_tensor(parameter)).all():
                raise ArtifactError(f"{name} holds a value beyond FP16's 65504", "lower train.learning_rate")


def write_outputs(trainer: Any, monitoring: MonitorSettings, fitted: FitResult, source: str, out: Path) -> int:
    """Write the adapter, metrics.jsonl and training.svg into `out`; return the adapter's bytes (0 on other ranks)."""
    state = trainer.state
    save_adapter(trainer.model, source, out)
    if not is_main_process():
        return 0
    lines = report_lines(state.log_history, state.max_steps, monitoring)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    draw(state.log_history, monitoring.loss_before, fitted.step, out / "training.svg")
    size = (out / "adapter_model.safetensors").stat().st_size
    log.info("the adapter has %.1f MB", size / 1e6)
    return size


def save_adapter(model: Any, source: str, out: Path) -> None:
    """Write the adapter in PEFT's format, matrices in FP16; its base is named by its source, not by a path."""
    full = {name: full_tensor(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    trained = {name: weight.half() if weight.ndim > 1 else weight for name, weight in full.items()}
    if not is_main_process():
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = source
        config.target_modules = sorted(config.target_modules)  # a set, with a different order in every process
    # With "auto", PEFT requests a repository with the source's name from the model hub.
    model.save_pretrained(out, state_dict=trained, safe_serialization=True, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
