"""Monitor a training: evaluate the held-out rows, keep the best adapter, report progress, stop a failing training.

In: the trainer's history, a function that computes the held-out loss. Out: `adapter.log/` beside the stage's folder
(metrics.jsonl with speed and memory, TensorBoard's files), log lines, and held-out losses in the history.
All decisions are made from the history, which checkpoints contain, so that a resumed run decides the same.
Does not write checkpoints.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tutor.artifacts.stage_folder import remove_logs
from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import open_weights
from tutor.machine.distributed import full_tensor, is_main_process, shard_like
from tutor.stages.train.held_out_loss import perplexity
from tutor.stages.train.metrics import (
    Pace,
    format_duration,
    gpu_utilization,
    open_tensorboard,
    report_text,
    resources,
    write_scalars,
)

log = logging.getLogger(__name__)

BEST = "best.safetensors"
"""File of the best adapter so far, in the checkpoints' folder, where a resumed run finds it."""
DIVERGENCE_STEPS = 20
"""Number of consecutive steps with a loss above the bound that are a divergence and not just difficult rows."""
MAX_SKIPPED_STEPS = 30
"""Maximum number of consecutive skipped steps: fp16's loss scaler halves its 65536 at each overflow, so that after 16
steps the gradients themselves are wrong."""
History = Sequence[Mapping[str, Any]]
"""The trainer's log_history: one entry per step, with `held_out_loss` when it was measured."""


@dataclass(frozen=True)
class MonitorSettings:
    """Settings and sizes of the training that is monitored."""

    rows: int  # per epoch
    tokens: int  # per epoch
    evaluations: int  # in all epochs
    patience: int  # evaluations without an improvement before training stops; 0: never
    report_every: int  # steps
    loss_before: float  # held-out loss before training, in nats
    skips_overflow: bool  # fp16's loss scaler skips steps whose gradients overflow
    keep: str = "best"  # or "last": the adapter of which evaluation is kept
    trackers: tuple[str, ...] = ()  # transformers' names of those that are reported to


def evaluation_steps(steps: int, evaluations: int) -> frozenset[int]:
    """Return the steps after which the held-out rows are scored: evenly spaced, the last step included."""
    return frozenset(max(1, -(-number * steps // evaluations)) for number in range(1, evaluations + 1))


def best_evaluation(history: History) -> tuple[int, float] | None:
    """Return step and held-out loss of the best evaluation, the first one among equals."""
    scored = [(entry["held_out_loss"], entry["step"]) for entry in history if "held_out_loss" in entry]
    return (min(scored)[1], min(scored)[0]) if scored else None


def evaluations_since_best(history: History) -> int:
    """Return the number of evaluations since the best one."""
    best = best_evaluation(history)
    return sum("held_out_loss" in entry and entry["step"] > best[0] for entry in history) if best else 0


def raise_on_failure(history: History, loss_before: float) -> None:
    """Raise ArtifactError when the newest loss is NaN or infinite, or when training diverges.

    A loss of None is a step that fp16's loss scaler skipped, which is a failure only for many steps in a row.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    step = history[-1]["step"]
    if losses[-1] is not None and not math.isfinite(losses[-1]):
        raise ArtifactError(f"the loss is {losses[-1]} at step {step}", "lower train.learning_rate")
    if len(losses) >= MAX_SKIPPED_STEPS and all(loss is None for loss in losses[-MAX_SKIPPED_STEPS:]):
        raise ArtifactError(
            f"no gradient was a number in the {MAX_SKIPPED_STEPS} steps to step {step}",
            "set train.precision to bf16 or fp32, or lower train.learning_rate",
        )
    bound = max(1.5 * loss_before, loss_before + 1)
    if len(losses) >= DIVERGENCE_STEPS and all(
        loss is not None and loss > bound for loss in losses[-DIVERGENCE_STEPS:]
    ):
        raise ArtifactError(
            f"training diverged: the loss has been above {bound:.2f} for {DIVERGENCE_STEPS} steps to step {step}, and "
            f"began at {loss_before:.2f}",
            "lower train.learning_rate, or raise train.warmup",
        )


def report_lines(history: History, steps: int, monitoring: MonitorSettings) -> list[dict[str, Any]]:
    """Return the reports of the first step, every `report_every`-th, the last, and each evaluation.

    A loss is the mean since the report before. The lines depend on the history only, not on the time.
    """
    evaluated = evaluation_steps(steps, monitoring.evaluations)
    lines: list[dict[str, Any]] = []
    window: list[float] = []
    for entry in history:
        if "loss" not in entry:
            continue
        window += [] if entry["loss"] is None else [entry["loss"]]
        step = entry["step"]
        if step not in (1, steps, *evaluated) and step % monitoring.report_every:
            continue
        loss = math.fsum(window) / len(window) if window else None
        line = {
            "step": step,
            "epoch": round(entry["epoch"], 3),
            "loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            "learning_rate": entry["learning_rate"],
            "grad_norm": entry["grad_norm"],
        }
        if "held_out_loss" in entry:
            line |= {
                "held_out_loss": entry["held_out_loss"],
                "held_out_perplexity": perplexity(entry["held_out_loss"]),
            }
        lines.append(line)
        window = []
    return lines


class Monitor(TrainerCallback):  # type: ignore[misc]
    """Monitors one training. The trainer must log every step; `close` closes TensorBoard's writer."""

    def __init__(self, folder: Path, monitoring: MonitorSettings, score: Callable[[], float]) -> None:
        self.stopped = False  # by patience
        self._folder = folder
        self._monitoring = monitoring
        self._score = score
        self.pace = Pace()
        self._evaluations: frozenset[int] = frozenset()
        self._utilization: list[int] = []  # the GPU's, in percent, after each step since the last report
        self._board: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start a new log, or continue it after the step that training resumes from."""
        del control
        self._evaluations = evaluation_steps(state.max_steps, self._monitoring.evaluations)
        self.pace.begin(state.global_step, state.epoch or 0.0)
        if not is_main_process():
            return
        path = self._folder / "metrics.jsonl"
        kept = []
        if state.global_step:
            lines = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.is_file() else []
            kept = [line for line in lines if _step_of(line) <= state.global_step]
        else:
            remove_logs(self._folder)
            (Path(args.output_dir) / BEST).unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept), "utf-8")
        self._board = open_tensorboard(self._folder / "tensorboard", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the GPU's utilization."""
        del args, state, control
        if (percent := gpu_utilization()) is not None:
            self._utilization.append(percent)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **given: Any) -> None:
        """Check the loss, evaluate when it is due, report. Raises ArtifactError when training fails."""
        if logs is None or "loss" not in logs:
            return
        entry = state.log_history[-1]
        if not math.isfinite(entry.get("grad_norm", 0.0)):
            entry["grad_norm"] = None  # JSON has no NaN
            entry["loss"] = None if self._monitoring.skips_overflow else entry["loss"]
        raise_on_failure(state.log_history, self._monitoring.loss_before)
        if state.global_step in self._evaluations:
            self._evaluate(entry, state, Path(args.output_dir) / BEST, given["model"])
            logs["held_out_loss"] = entry["held_out_loss"]  # for the trackers, whose turn is later
            patience = self._monitoring.patience
            if (
                patience
                and evaluations_since_best(state.log_history) >= patience
                and state.global_step < state.max_steps
            ):
                log.info("no better held-out loss in %d evaluations: training ends", patience)
                self.stopped = control.should_training_stop = True
        if is_main_process():
            self._report(state)

    def _evaluate(self, entry: dict[str, Any], state: Any, path: Path, model: Any) -> None:
        with self.pace.paused():
            entry["held_out_loss"] = self._score()
            best = best_evaluation(state.log_history) == (entry["step"], entry["held_out_loss"])
            if best and self._monitoring.keep == "best":
                if is_main_process():
                    path.parent.mkdir(parents=True, exist_ok=True)
                save_trainable(model, path, entry["step"], entry["held_out_loss"])

    def _report(self, state: Any) -> None:
        progress = {"done": state.global_step, "total": state.max_steps}
        evaluations_left = len([step for step in self._evaluations if step > state.global_step])
        eta = self.pace.seconds_left(state.global_step, state.max_steps, evaluations_left)
        newest = report_lines(state.log_history, state.max_steps, self._monitoring)[-1:]
        if not newest or newest[0]["step"] != state.global_step:
            loss = state.log_history[-1]["loss"]
            text = "skipped" if loss is None else f"loss {loss:.4f}"
            text = f"{text}, {format_duration(eta)} left"
            log.info("step %d/%d: %s", *progress.values(), text, extra={**progress, "live": True})
            return
        speed = self.pace.since_report(state.global_step, state.epoch, self._monitoring.rows, self._monitoring.tokens)
        line = {**newest[0], **speed, "seconds_left": round(eta), **resources(self._utilization)}
        self._utilization.clear()
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        write_scalars(self._board, line)
        log.info("step %d/%d: %s", *progress.values(), report_text(line), extra=progress)

    def close(self) -> None:
        """Flush and close TensorBoard's writer."""
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that a kill has cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def save_trainable(model: Any, path: Path, step: int, loss: float) -> None:
    """Write the trainable parameters in full, with their step and their held-out loss."""
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tensors = {name: full_tensor(weight.detach()).cpu() for name, weight in trainable.items()}
    if is_main_process():
        save_file(tensors, path, metadata={"step": str(step), "held_out_loss": repr(loss)})


def report_lower(history: History) -> None:
    """Log the best evaluation where it is not the last one, whose adapter is kept."""
    best = best_evaluation(history)
    last = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry][-1:]
    if best and best[1] < last[0]:
        log.info("the last adapter is kept: held-out loss %.4f, and %.4f at step %d", last[0], best[1], best[0])


def restore_best(model: Any, checkpoints: Path, history: History) -> int | None:
    """Restore the best adapter when it is better than the last one; return the step of the model's adapter.

    Returns None when there was no evaluation. The loss is read from the file: after a crash, the file may be of a step
    that is not the best one in the resumed run's history.
    """
    scored = [entry for entry in history if "held_out_loss" in entry]
    if not scored:
        return None
    last, step = scored[-1]["held_out_loss"], int(scored[-1]["step"])
    if not (checkpoints / BEST).is_file():
        log.warning("the best adapter so far is missing from %s: the last one is kept", checkpoints)
        return step
    with open_weights(checkpoints / BEST) as file:
        best = file.metadata()
        if float(best["held_out_loss"]) >= last:
            return step
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(shard_like(file.get_tensor(name), weight))
    log.info(
        "the adapter of step %s is kept: held-out loss %.4f, and %.4f at the end",
        best["step"], float(best["held_out_loss"]), last,
    )  # fmt: skip
    return int(best["step"])
