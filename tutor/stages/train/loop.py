"""The training itself: the trainer under watch, the best adapter kept, and what it came to written down.

In: a trainer whose rows are audited. Out: the adapter in PEFT's format, metrics.jsonl, training.svg: the same bytes of
the same training, whatever the clock said.
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
from transformers import PrinterCallback

from tutor.errors import ArtifactError
from tutor.machine.distributed import full_tensor, is_main_process
from tutor.prompt import Encoded
from tutor.stages.train.held_out_loss import mean_loss, perplexity, refuse_packed
from tutor.stages.train.monitor import Course, Monitor, reports, restore_best
from tutor.stages.train.plot import draw

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What a training came to."""

    step: int  # whose adapter was kept
    loss: float  # of the held-out rows, with the adapter as its file holds it
    seconds: float  # of training in this process, without evaluations
    epochs: float  # in those seconds


def fit(
    trainer: Any,
    course: Course,
    held_out: Sequence[Encoded],
    folder: Path,
    session: AbstractContextManager[object],
    resume: Path | None = None,
) -> Fitted:
    """Train, and leave the model with the best adapter as its file will hold it. `folder` gets the running log.

    Goes on from the checkpoint `resume`. `session` is open while the trainer trains: it saves and answers signals.

    Raises ArtifactError when training fails, or ends before its last step for another reason than patience.
    """
    model = trainer.model
    refuse_packed(model)
    trainer.remove_callback(PrinterCallback)
    monitor = Monitor(folder, course, lambda: mean_loss(model, held_out))
    trainer.add_callback(monitor)
    with contextlib.closing(monitor), session:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    state = trainer.state
    if state.global_step != state.max_steps and not monitor.stopped:
        raise ArtifactError(f"training ended at step {state.global_step} of {state.max_steps}")
    kept = restore_best(model, Path(trainer.args.output_dir), state.log_history)
    round_adapter(model)
    after = mean_loss(model, held_out)
    log.info("held-out loss after training: %.4f (perplexity %.2f)", after, perplexity(after))
    if after > course.start:
        log.warning("training made the held-out loss worse: %.4f, and %.4f before", after, course.start)
    return Fitted(kept or state.global_step, after, *monitor.pace.trained(state.epoch))


def round_adapter(model: Any) -> None:
    """Round the weights that train to FP16, so that what is measured afterwards is what the file says.

    Half the size, and enough: the change that a demo's adapter makes of its base moves by 0.02 %, an eightieth of what
    the merged model's own FP16 rounds away. Raises ArtifactError for a value beyond FP16's 65504.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(parameter.half().float())
            if not torch.isfinite(full_tensor(parameter)).all():
                raise ArtifactError(f"{name} holds a value beyond FP16's 65504", "lower train.learning_rate")


def write(trainer: Any, course: Course, fitted: Fitted, source: str, out: Path) -> int:
    """Adapter, metrics.jsonl and training.svg into `out`; bytes of the adapter, for the process that wrote it."""
    state = trainer.state
    save_adapter(trainer.model, source, out)
    if not is_main_process():
        return 0
    lines = reports(state.log_history, state.max_steps, course)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    draw(state.log_history, course.start, fitted.step, out / "training.svg")
    size = (out / "adapter_model.safetensors").stat().st_size
    log.info("the adapter has %.1f MB", size / 1e6)
    return size


def save_adapter(model: Any, source: str, out: Path) -> None:
    """The adapter in PEFT's format and FP16, naming its base by source and not by this machine's path."""
    trained = {name: full_tensor(weight).half() for name, weight in model.named_parameters() if weight.requires_grad}
    if not is_main_process():
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = source
        config.target_modules = sorted(config.target_modules)  # of a set, whose order is another in every process
    # "auto" would ask the model hub for a repository named like the source.
    model.save_pretrained(out, state_dict=trained, safe_serialization=True, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
